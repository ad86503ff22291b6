#!/usr/bin/env bash
# kernel.sh DIR: the guest's kernel at DIR/vmlinux and its module at DIR/xfs.ko, an empty file where the kernel has none.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: kernel.sh DIR" >&2; exit 2; }
dir=$(realpath "$1")
cd "$(dirname "$0")/.."
kernel=$(kernel-config/build.sh)
module=$(dirname "$kernel")/xfs.ko
ln -sfn "$kernel" "$dir/vmlinux"
if [ -f "$module" ]; then
    ln -sfn "$module" "$dir/xfs.ko"
elif [ -L "$dir/xfs.ko" ] || [ ! -e "$dir/xfs.ko" ]; then
    rm -f "$dir/xfs.ko"
    : >"$dir/xfs.ko"
fi
