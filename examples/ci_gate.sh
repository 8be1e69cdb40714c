#!/bin/sh
# A gate for continuous integration: a live update keeps to its budgets, and is no slower than the
# one that was stored.
#
#     BUDGET=blackout=50ms,devices/RESTORE=20ms LIMIT=25% \
#       examples/ci_gate.sh baseline.json --preset cloud --drivers my_driver.py
#
# Exit status, as luo's: 0 passed, 1 the live update failed, 2 wrong usage, 3 over budget or slower.
# Without baseline.json this run becomes it, if it keeps to its budgets: have CI keep the file, and
# delete it when slower is what you want. This run is beside it, as baseline.json.new.
#
# Both runs must be of one kind of machine. Where machines differ, or are busy with other things, a
# virtual clock takes noise out: REPEAT=1, and --clock virtual --cost FILE among the options.
set -u

if [ $# -lt 1 ]; then
  echo "usage: [BUDGET=NAME=T,…] [LIMIT=P%] [REPEAT=N] $0 BASELINE.json [options of luo run]" >&2
  exit 2
fi
luo=${LUO:-luo} # a command and its arguments
baseline=$1
shift

$luo run --repeat "${REPEAT:-20}" --budget "${BUDGET:-blackout=50ms}" --json "$baseline.new" "$@"
budgets=$?
# Over budget is no reason not to say what became slower; any other failure is.
[ "$budgets" -eq 0 ] || [ "$budgets" -eq 3 ] || exit "$budgets"

if [ ! -e "$baseline" ]; then
  [ "$budgets" -eq 0 ] || exit "$budgets"
  mv "$baseline.new" "$baseline" || exit 2
  echo "stored as $baseline"
  exit 0
fi
echo
$luo compare "$baseline" "$baseline.new" --fail-slower "${LIMIT:-25%}"
slower=$?
[ "$slower" -eq 0 ] || exit "$slower"
exit "$budgets"
