#!/bin/sh
# install.sh ROOT: installs mvm on the host whose root directory is mounted at ROOT, and restarts containerd if its
# configuration has changed. For a container with the host's process ids; $MVM is the program, $RESTART the command
# that restarts containerd there.
set -eu
root=${1:?usage: install.sh ROOT}
config=$root/etc/containerd/config.toml

sum() {
    if [ -e "$config" ]; then cksum <"$config"; else echo none; fi
}

before=$(sum)
# In the host's own root: its own containerd judges the configuration.
mkdir -p "$root/usr/local/bin"
copy=/usr/local/bin/.mvm-installer
trap 'rm -f "$root$copy"' EXIT
cp "${MVM:-/mvm}" "$root$copy"
chmod 0755 "$root$copy"
chroot "$root" "$copy" install --containerd
if [ "$(sum)" != "$before" ]; then
    ${RESTART:-nsenter -t 1 -m -u -i -n -p -- systemctl restart containerd}
    echo "containerd restarted"
fi
chroot "$root" /usr/local/bin/mvm doctor || echo "mvm doctor is not content: pods will fail until it is" >&2
