#!/usr/bin/env bash
# Builds the guest kernel and its module, and prints the path of vmlinux; xfs.ko is beside it.
#
#   build.sh            build, or find in the cache
#   build.sh --cached   exit 0 if the cache has it already
#   build.sh --config   print what the fragments ask for and the configuration lacks
#
# Source: the distribution's linux-source-6.12, or KERNEL_SRC=DIR. KERNEL=vmlinux is taken as it is, with an xfs.ko
# beside it or without.
# The result is kept under ${XDG_CACHE_HOME:-~/.cache}/mvm/kernel-KEY, KEY being the hash of source version,
# fragments and recipe; so a second clone builds nothing.
set -euo pipefail
cd "$(dirname "$0")"
. ../scripts/lib.sh
mode=${1:-build}
tarball=/usr/src/linux-source-6.12.tar.xz
# Raise this when the same fragments would give another kernel.
recipe=2

if [ -n "${KERNEL:-}" ]; then
    [ -r "$KERNEL" ] || fail 2 "KERNEL=$KERNEL cannot be read"
    [ "$mode" = build ] && realpath "$KERNEL"
    exit 0
fi

source_id() {
    if [ -n "${KERNEL_SRC:-}" ]; then
        [ -f "$KERNEL_SRC/Makefile" ] || fail 2 "KERNEL_SRC=$KERNEL_SRC is not a Linux source tree"
        make -s -C "$KERNEL_SRC" kernelversion
        (cd "$KERNEL_SRC" && git describe --always --dirty 2>/dev/null || true)
    else
        dpkg-query -W -f '${source:Version}' linux-source-6.12 2>/dev/null || sha256sum "$tarball" 2>/dev/null || true
    fi
}
id=$(source_id)
config_key=$( { echo $recipe; cat ./*.config; } | sha256sum | cut -c1-16)
key=$( { printf '%s\n' "$id" $recipe; cat ./*.config; } | sha256sum | cut -c1-16)
cache=$(cache_dir)
out=$cache/kernel-$key

# Without the source package a kernel of the same fragments, whatever its source version, is as good.
if [ -z "$id" ]; then
    for dir in "$cache"/kernel-*/; do
        [ -f "$dir/vmlinux" ] && [ "$(cat "$dir/config-key" 2>/dev/null)" = "$config_key" ] && out=${dir%/} && break
    done
fi
if [ "$mode" = --cached ]; then [ -f "$out/vmlinux" ]; exit; fi
if [ "$mode" = build ] && [ -f "$out/vmlinux" ]; then printf '%s\n' "$out/vmlinux"; exit 0; fi

mkdir -p "$cache"
exec 9>"$cache/kernel-$key.lock"
flock -n 9 || { say "another build makes this kernel; waiting for it"; flock 9; }
if [ "$mode" = build ] && [ -f "$out/vmlinux" ]; then printf '%s\n' "$out/vmlinux"; exit 0; fi

work=$cache/build-$key
rm -rf "$work"
trap 'rm -rf "$work" "$cache/kernel-$key.lock"' EXIT
mkdir -p "$work/obj"
start=$SECONDS
if [ -n "${KERNEL_SRC:-}" ]; then
    src=$(realpath "$KERNEL_SRC")
else
    [ -r "$tarball" ] || fail 2 "$tarball is missing" "apt-get install linux-source-6.12, or give KERNEL_SRC=DIR or KERNEL=vmlinux"
    say "kernel: unpacking the source"
    tar -C "$work" -xf "$tarball"
    src=$work/linux-source-6.12
fi
cat ./*.config >"$work/fragment"
make -s -C "$src" O="$work/obj" KCONFIG_ALLCONFIG="$work/fragment" allnoconfig >"$work/log" 2>&1 ||
    { tail -n 20 "$work/log" >&2; fail 1 "the kernel's configuration failed"; }
lacking=$(while IFS= read -r line; do
    case $line in
    CONFIG_*=n) ! grep -q "^${line%%=*}=" "$work/obj/.config" || printf '%s\n' "still on: ${line%%=*}" ;;
    CONFIG_*) grep -qxF "$line" "$work/obj/.config" || printf '%s\n' "missing: $line" ;;
    esac
done <"$work/fragment")
[ "$mode" != --config ] || { printf '%s\n' "${lacking:-everything asked for is there}"; exit 0; }
[ -z "$lacking" ] || fail 1 "the configuration does not give what the fragments ask for:" "$lacking"

# About this many objects; only the progress line depends on it.
total=2090
jobs=$(nproc)
say "kernel: building with $jobs jobs (8-20 minutes on two cores, once)"
make -C "$src" O="$work/obj" -j"$jobs" vmlinux modules >"$work/log" 2>&1 &
make_pid=$!
shown=0
while kill -0 $make_pid 2>/dev/null; do
    sleep 2
    done_objects=$(grep -cE '^  (CC|AS|LD|AR) ' "$work/log" || true)
    percent=$((done_objects * 100 / total))
    [ $percent -le 99 ] || percent=99
    if [ -t 2 ]; then
        printf '\rmvm: kernel: %d%% (%s) ' $percent "$(human $((SECONDS - start)))" >&2
    elif [ $percent -ge $((shown + 10)) ]; then
        shown=$percent
        say "kernel: $percent% ($(human $((SECONDS - start))))"
    fi
done
[ ! -t 2 ] || printf '\r' >&2
wait $make_pid || { grep -E -B2 -A8 'error|Error' "$work/log" | tail -n 30 >&2; fail 1 "the kernel does not build"; }
mkdir -p "$work/out"
strip -o "$work/out/vmlinux" "$work/obj/vmlinux"
# Every other module would be one that a guest asks for and nobody brings.
modules=$(sed 's|.*/||' "$work/obj/modules.order")
[ "$modules" = xfs.o ] || fail 1 "the kernel has other modules than xfs:" "$modules"
strip --strip-debug -o "$work/out/xfs.ko" "$work/obj/fs/xfs/xfs.ko"
cp "$work/obj/System.map" "$work/out/"
cp "$work/obj/.config" "$work/out/config"
printf '%s\n' "$config_key" >"$work/out/config-key"
rm -rf "$out"
mv "$work/out" "$out"
say "kernel: built in $(human $((SECONDS - start)))"
printf '%s\n' "$out/vmlinux"
