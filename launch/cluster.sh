#!/usr/bin/env bash
# Starts Ray on one machine of a cluster; docs/clusters.md tells the rest.
#
#   launch/cluster.sh head            [flags of ray start]   on one machine
#   launch/cluster.sh worker HEAD_IP  [flags of ray start]   on every other one
#   launch/cluster.sh token                                  prints the token that all machines share
#   launch/cluster.sh stop                                   ends every Ray process of this machine
#
# PORT (6379) is the port of the head; DASHBOARD_HOST (127.0.0.1) is where the dashboard, which takes jobs, listens.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ray=$(command -v ray || true)
if [[ -z $ray && -x $root/.venv/bin/ray ]]; then ray=$root/.venv/bin/ray; fi
[[ -n $ray ]] || fail "no ray command: activate the environment that sae_rl is installed in"

# A job's `python` is found through the PATH that Ray was started with.
PATH=$(dirname "$ray"):$PATH
port=${PORT:-6379}
# Whoever reaches an open Ray port can run code on the machine. All nodes must share one token and one mode.
export PATH RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=0

command=${1:-}
[[ $# -eq 0 ]] || shift
case $command in
  head)
    if [[ $RAY_AUTH_MODE == token ]]; then (umask 077; ray get-auth-token --generate >/dev/null); fi
    ulimit -Sn "$(ulimit -Hn)"  # Ray keeps a connection per worker
    exec ray start --head --port="$port" --include-dashboard=true --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" \
      --disable-usage-stats "$@"
    ;;
  worker)
    [[ $# -ge 1 && $1 != -* ]] || fail "launch/cluster.sh worker HEAD_IP: the address of the head is missing"
    head=$1
    shift
    if [[ $RAY_AUTH_MODE == token ]] && ! ray get-auth-token >/dev/null 2>&1; then
      fail "no token here: put what \`$0 token\` prints on the head into ~/.ray/auth_token or RAY_AUTH_TOKEN"
    fi
    ulimit -Sn "$(ulimit -Hn)"
    exec ray start --address="$head:$port" "$@"
    ;;
  token) exec ray get-auth-token ;;
  stop) exec ray stop ;;
  *)
    usage
    exit 2
    ;;
esac
