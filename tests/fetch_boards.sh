#!/bin/sh
# Put the device trees of arm64 boards that Debian ships with its newest kernel into a directory:
#
#     tests/fetch_boards.sh DIRECTORY
#
# apt works in a directory of its own, with an architecture and package lists of its own, and
# nothing is installed: the package is only unpacked. Needs apt-get, dpkg-deb and the network. The
# archive is the one that the system uses, or MIRROR=URI.
set -eu

to=$1
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
suite=$(. /etc/os-release && [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-stable}" || echo stable)
archive=${MIRROR:-$(apt-get indextargets --format '$(ORIGIN)|$(COMPONENT)|$(RELEASE)|$(REPO_URI)' \
  'Created-By: Packages' | grep -v -- '-security|' | sed -n 's/^Debian|main|[^|]*|//p' | head -n 1)}
[ -n "$archive" ] || { echo "apt-get knows no archive of Debian: give MIRROR=URI" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/parts"
: >"$work/status"
echo "deb [signed-by=$keyring] $archive $suite main" >"$work/sources.list"
cat >"$work/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "";
Acquire::Languages "none";
Dir::State "$work";
Dir::State::lists "$work/lists";
Dir::State::status "$work/status";
Dir::Cache "$work";
Dir::Etc::sourceparts "$work/parts";
Dir::Etc::sourcelist "$work/sources.list";
CONF
export APT_CONFIG="$work/apt.conf"

cd "$work"
apt-get -qq update
package=$(apt-cache depends --important linux-image-arm64 | sed -n 's/^ *Depends: //p' | head -n 1)
apt-get -qq download "$package"
dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x --wildcards '*.dtb'
cd - >/dev/null
mkdir -p "$to"
(cd "$work" && find . -name '*.dtb') | while read -r file; do
  cp "$work/$file" "$to/$(echo "$file" | sed 's:.*/linux-image[^/]*/::; s:/:-:g')"
done
echo "$package" >"$to/FROM"
echo "$(find "$to" -name '*.dtb' | wc -l) device trees of $package in $to"
