#!/usr/bin/env bash
# build.sh OUT.tar: a userland on musl: busybox plus programs linked dynamically by musl-gcc.
set -euo pipefail
out=$(realpath -ms "$1")
cd "$(dirname "$0")"
. ../oci.sh
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
mkdir -p "$root"/{bin,dev,etc,lib,proc,root,sys,tmp,usr/bin}
chmod 1777 "$root/tmp"
cp /bin/busybox "$root/bin/busybox"
for applet in $(/bin/busybox --list); do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
cp -L /usr/lib/x86_64-linux-musl/libc.so "$root/lib/ld-musl-x86_64.so.1"
for source in *.c; do
    musl-gcc -O2 -Wall -Wl,-dynamic-linker,/lib/ld-musl-x86_64.so.1 -o "$root/usr/bin/${source%.c}" "$source"
done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"
oci_pack "$root" "$out" musl:latest '{"Cmd":["sh"],"Env":["PATH=/usr/bin:/bin"]}'
