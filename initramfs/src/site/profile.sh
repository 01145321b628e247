# Layercake: the rescue shell's and ssh's environment.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PS1='layer0# '
