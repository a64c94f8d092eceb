# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts of the tests.
set -euo pipefail
trap 'echo "failed in line $LINENO: $BASH_COMMAND"' ERR

# Have the host do something, and wait until it is done. What that can be: scripts/vm_test.py.
host() {
    echo "HOST:$*"
    local answer
    read -r answer <&3
    [ "$answer" = done ] || { echo "the host: $answer"; return 1; }
}

# The address of the host's NBD server.
server=10.0.2.100

# The Debian package of this tree; only tests that say so have it (`has_package` in scripts/vm_test.py).
install_package() {
    dpkg -i ./nbdtarget.deb >/tmp/dpkg.log 2>&1 || { cat /tmp/dpkg.log; return 1; }
}

# attach DEVICE EXPORT CONNECTIONS
attach() {
    nbd-client "$server" 10809 "$1" -N "$2" -C "$3" >/tmp/nbd-client.log 2>&1 || { cat /tmp/nbd-client.log; return 1; }
}

# make_fs TYPE DEVICE
make_fs() {
    case $1 in
    ext4) mkfs.ext4 -q -F "$2" ;;
    xfs) mkfs.xfs -q -f "$2" ;;
    # It tells at length what its defaults are.
    btrfs) mkfs.btrfs -q -f "$2" >/tmp/mkfs.log 2>&1 || { cat /tmp/mkfs.log; return 1; } ;;
    esac
}

# check_fs TYPE DEVICE: fails if the file system, which is not mounted, has a fault.
check_fs() {
    case $1 in
    ext4) e2fsck -fn "$2" ;;
    xfs) xfs_repair -n "$2" ;;
    btrfs) btrfs check --readonly "$2" ;;
    esac >/tmp/check.log 2>&1 || { cat /tmp/check.log; return 1; }
}

# fill FOLDER MIB: files of random content and their checksums.
fill() {
    local nr
    for nr in $(seq "$2"); do
        head -c 1M /dev/urandom >"$1/file$nr"
    done
    (cd "$1" && sha256sum file* >sums)
    sync -f "$1"
}

# verify FOLDER: the files are as `fill` has made them.
verify() {
    (cd "$1" && sha256sum --quiet -c sums)
}
