#!/bin/sh
# Layercake: lets those in whose keys are in /etc/layercake/authorized_keys; no passwords. The rescue shell starts it, and the
# agent where /etc/layercake/ssh.always is.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
pid=/run/dropbear.pid
[ -s $pid ] && kill -0 "$(cat $pid)" 2>/dev/null && exit 0
if [ ! -s /etc/layercake/authorized_keys ]; then
    echo "ssh: there are no keys: cargo xtask overlay --authorized-key FILE"
    exit 1
fi
# The node's own key is made at its first use, and kept on its disk where it has one.
dir=/run/ssh
grep -q ' /run/layercake/disk ' /proc/mounts && dir=/run/layercake/disk/ssh
mkdir -p -m 700 $dir
given=/etc/layercake/ssh_host_key
key=$dir/host_key
if [ -s $given ]; then
    key=$dir/given
    cp $given $key
    grep -q 'BEGIN OPENSSH PRIVATE KEY' $given && dropbearconvert openssh dropbear $given $key >/dev/null 2>&1
elif [ ! -s $key ]; then
    dropbearkey -t ed25519 -f $key >/dev/null 2>&1
fi
# No passwords, no forwarding.
dropbear -s -j -k -r $key -P $pid || exit 1
echo "ssh: host key $(dropbearkey -y -f $key | grep -i fingerprint)"
