#!/usr/bin/env bash
# build.sh OUT.tar [full]: Debian 12 with the programs of the end-to-end tests (`full`: also those of test-full).
# Kept in the cache by a hash of this recipe, since it takes minutes.
set -euo pipefail
out=$(realpath -ms "$1")
flavour=${2:-base}
cd "$(dirname "$0")"
. ../oci.sh
. ../debian.sh
. ../../scripts/lib.sh
packages=python3,perl,sqlite3,openssl,git,gcc,libc6-dev,gawk,xz-utils,zstd,procps,libpython3.11-testsuite
[ "$flavour" = base ] || packages=$packages,nodejs,postgresql,redis-server,redis-tools,golang-go,default-jdk-headless,stress-ng
key=$(cat build.sh ../oci.sh ../debian.sh | sha256sum | cut -c1-16)-$flavour
cached=$(cache_dir)/image-debian-$key.tar
if [ ! -f "$cached" ]; then
    mkdir -p "$(cache_dir)"
    say "debian: mmdebstrap of $packages"
    work=$(mktemp -d -p "$(cache_dir)")
    trap 'rm -rf --one-file-system "$work"' EXIT
    rm -f "$(cache_dir)"/image-debian-*-"$flavour".tar
    debian_tree "$packages" "$work/root" >&2
    rm -rf "${work:?}/root/dev" && mkdir "$work/root/dev"
    oci_pack "$work/root" "$cached" "debian:$([ "$flavour" = base ] && echo latest || echo full)" \
        '{"Cmd":["bash"],"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","LANG=C.UTF-8"]}'
fi
mkdir -p "$(dirname "$out")"
# Not a symbolic link: another clone with another recipe removes what it finds in the cache.
ln -f "$cached" "$out" 2>/dev/null || cp --reflink=auto "$cached" "$out"
