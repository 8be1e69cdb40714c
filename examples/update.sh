#!/bin/sh
# A live update by hand, with the files that RFC v1 has; for a directory of 'luo mount':
#
#     mkdir -p /tmp/sys && luo mount --preset cloud /tmp/sys &
#     examples/update.sh /tmp/sys 'pci0000:00/*'
#
# Only the jump is not RFC v1's: there it is 'kexec -e', and this script would go on after the boot.
set -eu

if [ $# -ne 2 ]; then
  echo "usage: $0 DIR DEVICES    DEVICES: a shell pattern below DIR/devices" >&2
  exit 2
fi
sys=$1
update=$sys/kernel/liveupdate

# 'set -e' does not see a failed redirection of echo in every shell.
put() {
  echo "$1" > "$2" || { echo "$0: $2 does not take $1 in state $(cat "$update/state")" >&2; exit 1; }
}

expect() {
  state=$(cat "$update/state")
  [ "$state" = "$1" ] || { echo "$0: the state is $state instead of $1" >&2; exit 1; }
  echo "$state"
}

expect normal
requested=0
for device in "$sys"/devices/$2; do
  [ -e "$device/liveupdate/requested" ] || continue
  put 1 "$device/liveupdate/requested"
  requested=$((requested + 1))
done
[ "$requested" -gt 0 ] || { echo "$0: no device matches $2" >&2; exit 1; }
echo "$requested devices requested"

put 1 "$update/prepare"
expect prepared
put 1 "$sys/kernel/debug/liveupdate/kexec"
expect updated

for device in "$sys"/devices/$2; do
  [ -e "$device/liveupdate/reclaimed" ] || continue
  [ "$(cat "$device/liveupdate/reclaimed")" = 1 ] || echo "not reclaimed: $device"
done
put 1 "$update/finish"
expect normal
