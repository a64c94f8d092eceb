# SPDX-License-Identifier: Apache-2.0
# The root disk of this machine is a clone of an image, which is copied while the machine runs. It is booted twice; the second time everything is as
# the first one has left it.
. ./common.sh
host status root
if [ -e /var/sums ]; then
    sha256sum --quiet -c /var/sums
    echo "booted again: all files are as they were"
else
    head -c 8M /dev/urandom >/var/file
    find /usr/lib/systemd -type f >/tmp/names
    sha256sum $(cat /tmp/names) /var/file >/var/sums
    sync
    echo "booted from a clone: $(wc -l </var/sums) files are summed"
fi
host status root
