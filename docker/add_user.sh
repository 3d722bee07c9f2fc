#!/usr/bin/env bash
# Make the user that the container runs as, where nobody has that number yet, and the folders that it writes to.
#   add_user.sh 1000 FOLDER ...
# The folders are open to all: the container may be started as the user whose files it works on.
set -euo pipefail

[ $# -ge 1 ] || { echo "add_user.sh: which user number?" >&2; exit 2; }
uid=$1
shift
getent passwd "$uid" > /dev/null || useradd --uid "$uid" --no-create-home --shell /usr/sbin/nologin trt-int8
for folder in "$@"; do
    install --directory --owner="$uid" --mode=0777 "$folder"
done
