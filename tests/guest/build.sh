#!/usr/bin/env bash
# The guest's kernel, init and stub. `make kernel` calls it.
#
#   LUO_GUEST_CACHE=DIR        where builds are kept, instead of build/guest
#   LUO_LINUX_SOURCE=FILE      a tar file of Linux's source, instead of Debian's package
#   LUO_GUEST_JOBS=N           compilers at a time, instead of one a processor
#
# What is there already, of the same configuration, is used again. Packages are installed with
# apt-get if the user may; the kernel's source comes from Debian's trixie-backports, read with lists
# of its own, so that nothing of the system's package sources changes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${LUO_GUEST_CACHE:-$here/../../build/guest}
series=7.3
package=linux-source-$series
suite=trixie-backports
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
cross=aarch64-linux-gnu-

say() { printf '%s: %s\n' "make kernel" "$*"; }
die() {
  say "$*" >&2
  exit 1
}

mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
kernel_key=$({ echo "$package"; cat "$here/kernel.config"; } | sha256sum | cut -c 1-16)
tools_key=$(cat "$here/init.c" "$here/stub.S" "$here/build.sh" | sha256sum | cut -c 1-16)
kernel=$cache/kernel-$kernel_key
tools=$cache/tools-$tools_key

work=
clean_up() { [ -z "$work" ] || rm -rf "$work"; }
trap clean_up EXIT

# need PACKAGE PROGRAM ...: what is missing of these is installed.
missing=()
need() {
  local package=$1 file
  shift
  for file; do
    case $file in
      /*) [ -e "$file" ] ;;
      *) command -v "$file" >/dev/null ;;
    esac || { missing+=("$package") && return; }
  done
}

install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null ||
    die "no apt-get here: install ${missing[*]}, or what they are called on this system"
  [ "$(id -u)" -eq 0 ] || die "as root: apt-get install ${missing[*]}"
  say "installing ${missing[*]}"
  apt-get -qq update || say "apt-get update failed; going on with the lists that are there"
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" \
    >/dev/null || die "apt-get could not install ${missing[*]}"
  missing=()
}

# fetch DIR: Debian's package of the source, unpacked below DIR.
fetch() {
  command -v apt-get >/dev/null || die "no apt-get here: give LUO_LINUX_SOURCE=FILE"
  [ -e "$keyring" ] || die "no $keyring: install debian-archive-keyring, or give LUO_LINUX_SOURCE"
  local place=$1 uri apt
  uri=$(apt-get indextargets --format '$(ORIGIN)|$(COMPONENT)|$(RELEASE)|$(REPO_URI)' \
    'Created-By: Packages' | grep -v -- '-security|' | sed -n 's/^Debian|main|[^|]*|//p' | head -n 1)
  [ -n "$uri" ] || die "apt-get knows no archive of Debian: run apt-get update first"
  mkdir -p "$place/lists/partial" "$place/archives/partial"
  echo "deb [signed-by=$keyring] $uri $suite main" >"$place/sources.list"
  apt=(apt-get -qq -o "Dir::Etc::SourceList=$place/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::PreferencesParts=/dev/null -o "Dir::State::Lists=$place/lists"
    -o "Dir::Cache=$place" -o "Dir::Cache::Archives=$place/archives" -o APT::Sandbox::User=root)
  say "reading the list of $suite"
  "${apt[@]}" update || die "$suite cannot be read from Debian's archive"
  say "fetching $package (160 MB)"
  (cd "$place" && "${apt[@]}" download "$package") ||
    die "$suite has no $package, or it cannot be fetched"
  dpkg-deb -x "$place/$package"_*.deb "$place"
  dpkg-deb -f "$place/$package"_*.deb Version >"$place/version"
}

build_kernel() {
  need xz-utils xz
  need gcc-aarch64-linux-gnu ${cross}gcc
  need gcc gcc
  need libc6-dev /usr/include/stdlib.h
  need make make
  need flex flex
  need bison bison
  need bc bc
  need libssl-dev /usr/include/openssl/ssl.h
  need perl perl
  install_missing
  work=$(mktemp -d "$cache/work.XXXXXX")
  local tree=$work/linux source=${LUO_LINUX_SOURCE:-} line
  if [ -z "$source" ]; then
    fetch "$work"
    source=$(echo "$work"/usr/src/linux-source-*.tar.xz)
  else
    basename "$source" >"$work/version"
  fi
  say "unpacking $(cat "$work/version")"
  mkdir "$tree"
  tar -C "$tree" --strip-components=1 -xf "$source"
  say "configuring"
  local make=(make -C "$tree" ARCH=arm64 "CROSS_COMPILE=$cross" "-j${LUO_GUEST_JOBS:-$(nproc)}")
  "${make[@]}" -s tinyconfig >/dev/null
  (cd "$tree" && scripts/kconfig/merge_config.sh -m .config "$here/kernel.config" >/dev/null)
  "${make[@]}" -s olddefconfig
  while read -r line; do
    case $line in
      CONFIG_*=y) grep -qx "$line" "$tree/.config" ;;
      '# CONFIG_'*' is not set') ! grep -q "^${line:2:-11}=" "$tree/.config" ;;
    esac || die "$(cat "$work/version") does not take $line"
  done < <(grep -E '^(# )?CONFIG_' "$here/kernel.config")
  say "building: 4 to 8 minutes on two processors; the log is $cache/build.log"
  "${make[@]}" Image >"$cache/build.log" 2>&1 || {
    tail -n 20 "$cache/build.log" >&2
    die "the kernel does not build; see $cache/build.log"
  }
  mkdir "$work/done"
  cp "$tree/arch/arm64/boot/Image" "$tree/.config" "$work/version" "$work/done/"
  mv "$work/done" "$kernel"
  rm -rf "$work"
  work=
}

build_tools() {
  need gcc-aarch64-linux-gnu ${cross}gcc
  need libc6-dev-arm64-cross /usr/aarch64-linux-gnu/lib/libc.a
  install_missing
  work=$(mktemp -d "$cache/work.XXXXXX")
  ${cross}gcc -static -s -O2 -march=armv8-a+crc -Wall -Wextra -Werror -o "$work/init" "$here/init.c"
  ${cross}gcc -c -o "$work/stub.o" "$here/stub.S"
  ${cross}objcopy -O binary -j .text "$work/stub.o" "$work/stub"
  rm "$work/stub.o"
  chmod 755 "$work"
  mv "$work" "$tools"
  work=
}

need qemu-system-arm qemu-system-aarch64
install_missing
[ -e "$kernel/Image" ] || build_kernel
[ -e "$tools/stub" ] || build_tools
mkdir -p "$cache/current"
ln -sfr "$kernel/Image" "$kernel/version" "$tools/init" "$tools/stub" "$cache/current/"
say "$(cat "$kernel/version"), in $cache/current"
