#!/usr/bin/env bash
# Starts Ray on one machine of a cluster. docs/clusters.md describes the rest.
#
#   launch/cluster.sh head            [flags of ray start]   on one machine
#   launch/cluster.sh worker HEAD_IP  [flags of ray start]   on every other machine
#   launch/cluster.sh token                                  prints the cluster's token
#   launch/cluster.sh stop                                   ends all Ray processes of this machine
#
# Variables: PORT of the head (6379); DASHBOARD_HOST, the address of the dashboard, which accepts jobs (127.0.0.1).
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
# Without a token anyone who reaches a Ray port can run code. All nodes need the same token and the same mode.
export PATH RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=0

command=${1:-}
[[ $# -eq 0 ]] || shift
case $command in
  head)
    if [[ $RAY_AUTH_MODE == token ]]; then (umask 077; ray get-auth-token --generate >/dev/null); fi
    ulimit -Sn "$(ulimit -Hn)"  # Ray keeps a connection to every worker
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
