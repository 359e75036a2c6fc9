#!/bin/sh
# Makes what compose.yaml takes from docker/secrets (or the folder that is named): passwords, and a
# key for Prometheus that may read metrics and nothing else. Keys of people: docs/deployment.md.
set -eu
folder=${1:-$(dirname "$0")/secrets}
if [ -e "$folder" ]; then
    echo "$folder is there already, with everybody's keys: docs/deployment.md says how to change one" >&2
    exit 1
fi
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# Of this folder no other user of the host gets past the door. What is in it is open to all, since
# containers read it as users of their own. The keys are a folder, so that an edited file is seen: a
# file that is mounted alone stays the old one when it is replaced.
mkdir -m 0700 "$folder"
umask 022
mkdir "$folder/keys"
redis=$(random)
token=dm-$(random)
printf 'requirepass %s\n' "$redis" > "$folder/redis.conf"
printf 'DEMUR_SPOOL=redis://:%s@redis:6379/0\n' "$redis" > "$folder/spool.env"
printf '%s' "$(random)" > "$folder/grafana_password"
printf '%s' "$token" > "$folder/metrics_token"
cat > "$folder/keys/keys.toml" <<END
[[keys]]
name = "prometheus"
sha256 = "$(printf '%s' "$token" | sha256sum | cut -d ' ' -f 1)"
scopes = []
END
