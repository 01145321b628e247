#!/bin/sh
# Layercake: what PID 1 starts on the console in rescue.
[ -x /etc/layercake/ssh ] && /etc/layercake/ssh
echo
layercake-agent why
echo
echo "This is the rescue shell. layercake-agent why: what the node waits for. dmesg: its log. The agent goes on trying."
exec /bin/sh -l
