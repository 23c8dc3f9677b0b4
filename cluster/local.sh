#!/usr/bin/env bash
# A Ray cluster of several nodes on this one machine, to try jobs out. It shares nothing with any other Ray here: own
# ports, own folder, own token; `stop` ends its processes by their numbers.
#
#   cluster/local.sh start [NODES]   a head and NODES workers (2) with two CPUs each
#   eval "$(cluster/local.sh env)"   let mal and ray in this shell use it
#   cluster/local.sh stop
#
# To change: MAL_LOCAL_DIR (short: Ray's sockets are in it), MAL_LOCAL_PORT, MAL_LOCAL_CPUS; the virtual environment's
# bin folder must come first in PATH.
set -euo pipefail

folder="${MAL_LOCAL_DIR:-${TMPDIR:-/tmp}/mal-local-$(id -u)}"
port="${MAL_LOCAL_PORT:-26379}"
cpus="${MAL_LOCAL_CPUS:-2}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" OMP_WAIT_POLICY=passive

# node NAME NUMBER ARGUMENTS...: one Ray node in the background, its process's number kept. A node whose ports are given
# need not wait for its agents to choose some, which on a busy machine takes longer than Ray waits.
node() {
  local name="$1" first=$((port + 10 * ($2 + 1)))
  shift 2
  setsid ray start --block --num-cpus="$cpus" --object-store-memory=500000000 \
    --dashboard-agent-listen-port="$first" --dashboard-agent-grpc-port=$((first + 1)) \
    --runtime-env-agent-port=$((first + 2)) --metrics-export-port=$((first + 3)) \
    "$@" > "$folder/$name.log" 2>&1 < /dev/null &
  echo $! >> "$folder/pids"
}

# alive: how many nodes the head says there are.
alive() {
  python - "http://127.0.0.1:$((port + 1))/nodes?view=summary" "$RAY_AUTH_TOKEN_PATH" 2> /dev/null << 'END' || echo 0
import json, pathlib, sys, urllib.request
request = urllib.request.Request(sys.argv[1])
request.add_header("Authorization", f"Bearer {pathlib.Path(sys.argv[2]).read_text()}")
nodes = json.load(urllib.request.urlopen(request, timeout=5))["data"]["summary"]
print(sum(node["raylet"].get("state") == "ALIVE" for node in nodes))
END
}

# up COUNT NAME NUMBER ARGUMENTS...: a node, until there are COUNT of them. On a busy machine Ray gives a start up after
# fifteen seconds; it is tried three times.
up() {
  local count="$1" tries
  shift
  for _ in 1 2 3; do
    node "$@"
    for ((tries = 0; tries < 240; tries++)); do
      if (($(alive) >= count)); then
        return
      fi
      kill -0 "$(tail -n 1 "$folder/pids")" 2> /dev/null || break
      sleep 0.5
    done
    kill -KILL -- "-$(tail -n 1 "$folder/pids")" 2> /dev/null || true
    sed -i '$d' "$folder/pids"
  done
  echo "$1 did not start: $folder/$1.log" >&2
  stop
  exit 1
}

start() {
  if [[ -e "$folder/pids" ]]; then
    echo "there is one already, in $folder: cluster/local.sh stop" >&2
    exit 1
  fi
  mkdir -p "$folder"
  (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$folder/token")
  up 1 head 0 --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
    --ray-client-server-port=$((port + 2)) --temp-dir="$folder/ray" --disable-usage-stats
  # One after the other: two that start at the same moment take the same name for their sockets, and both end.
  for ((k = 1; k <= $1; k++)); do
    up $((k + 1)) "worker$k" "$k" --address="127.0.0.1:$port"
  done
  echo "started $((1 + $1)) nodes in $folder; next: eval \"\$(cluster/local.sh env)\"" >&2
}

# stop: the workers first; whoever has not gone after ten seconds is killed.
stop() {
  if [[ ! -e "$folder/pids" ]]; then
    echo "none is running in $folder" >&2
    return
  fi
  while read -r pid; do
    kill -TERM -- "-$pid" 2> /dev/null || true
    for ((tries = 0; tries < 50; tries++)); do
      kill -0 -- "-$pid" 2> /dev/null || break
      sleep 0.2
    done
    kill -KILL -- "-$pid" 2> /dev/null || true
  done < <(tac "$folder/pids")
  rm "$folder/pids"
}

case "${1:-}" in
  start) start "${2:-2}" ;;
  stop) stop ;;
  env)
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$((port + 1))"
    echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='$folder/token'"
    ;;
  *)
    sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3- >&2
    exit 2
    ;;
esac
