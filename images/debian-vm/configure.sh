# Runs in the new system, as its root: what an installer would ask, and what a first boot would do.
echo debian >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 debian\n' >/etc/hosts
rm -f /etc/resolv.conf
echo '/dev/vda / ext4 defaults 0 1' >/etc/fstab
passwd -d root

# The initrd has the modules of this machine in place of those of every machine, a third of the size, and is quickly unpacked. Which of
# the modules are wanted is still found out at boot, by the names that ACPI gives the devices.
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=lz4/' /etc/initramfs-tools/initramfs.conf
printf '%s\n' virtio_mmio virtio_blk virtio_console ext4 >>/etc/initramfs-tools/modules
update-initramfs -u -k all

# The packages' scripts have just done what units do after an update.
touch -r /usr /etc/.updated /var/.updated

# They look for snapshots of logical volumes.
systemctl mask --quiet e2scrub_reap.service e2scrub_all.timer
