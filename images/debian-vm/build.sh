#!/usr/bin/env bash
# build.sh OUT: Debian 12 as a system of its own, for `mvm run --unikernel linux`. OUT becomes a directory with
#
#   vmlinuz      the distribution's cloud kernel, the file as it is in its package
#   initrd.img   what initramfs-tools makes for it
#   root.img     an ext4 file system, to be mounted from /dev/vda: systemd, udev, and a root who logs in without a password
#
# Needs neither root nor loop devices. Kept in the cache by a hash of this recipe, since it takes a minute or two.
set -euo pipefail
out=$(realpath -ms "$1")
cd "$(dirname "$0")"
. ../debian.sh
. ../../scripts/lib.sh
PATH=$PATH:/usr/sbin:/sbin
packages=linux-image-cloud-amd64,initramfs-tools,systemd-sysv,udev,lz4
key=$(cat build.sh configure.sh ../debian.sh | sha256sum | cut -c1-16)
cached=$(cache_dir)/debian-vm-$key

# Makes root.img of the tree, with the owners that the files have in the archive.
pack() { # pack TREE.tar DIR
    local tree=$2/tree
    mkdir "$tree"
    # The kernel mounts its own /dev.
    tar -C "$tree" --numeric-owner --xattrs --xattrs-include='*' --exclude='./dev/*' -xf "$1"
    # Without one every boot of the image would be a first boot, with its hundreds of presets.
    printf 'debian-vm' | md5sum | cut -c1-32 >"$tree/etc/machine-id"
    cp "$tree"/boot/vmlinuz-* "$2/vmlinuz"
    cp "$tree"/boot/initrd.img-* "$2/initrd.img"
    # Half as much again as there is, of which the file takes what is used.
    mke2fs -q -t ext4 -L root -m 0 -d "$tree" "$2/root.img" "$(($(du -sk "$tree" | cut -f1) * 3 / 2))k"
    rm -rf --one-file-system "$tree"
}

if [ "${2:-}" = --pack ]; then # as root, or under fakeroot
    pack "$3" "$out"
    exit
fi
if [ ! -d "$cached" ]; then
    mkdir -p "$(cache_dir)"
    say "debian-vm: mmdebstrap of $packages"
    work=$(mktemp -d -p "$(cache_dir)")
    trap 'rm -rf --one-file-system "$work"' EXIT
    debian_tree "$packages" - --customize-hook='chroot "$1" sh -es <configure.sh' >"$work/tree.tar"
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(fakeroot)
    mkdir -m 755 "$work/vm"
    "${as_root[@]}" bash ./build.sh "$work/vm" --pack "$work/tree.tar" >&2
    rm -rf --one-file-system "$(cache_dir)"/debian-vm-*
    mv "$work/vm" "$cached"
fi
mkdir -p "$(dirname "$out")"
ln -sfn "$cached" "$out"
