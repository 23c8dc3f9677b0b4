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

# node NAME ARGUMENTS...: one Ray node in the background, its number kept.
node() {
  local name="$1"
  shift
  setsid ray start --block --num-cpus="$cpus" "$@" > "$folder/$name.log" 2>&1 < /dev/null &
  echo $! >> "$folder/pids"
}

start() {
  if [[ -e "$folder/pids" ]]; then
    echo "there is one already, in $folder: cluster/local.sh stop" >&2
    exit 1
  fi
  mkdir -p "$folder"
  (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$folder/token")
  node head --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
    --dashboard-agent-listen-port=$((port + 2)) --ray-client-server-port=$((port + 3)) \
    --temp-dir="$folder/ray" --disable-usage-stats
  for ((tries = 0; ; tries++)); do
    if python -c "import socket; socket.create_connection(('127.0.0.1', $((port + 1))), 1)" 2> /dev/null; then
      break
    fi
    if ((tries == 120)) || ! kill -0 "$(head -n 1 "$folder/pids")" 2> /dev/null; then
      echo "the head did not start: $folder/head.log" >&2
      stop
      exit 1
    fi
    sleep 1
  done
  for ((k = 1; k <= ${1:-2}; k++)); do
    node "worker$k" --address="127.0.0.1:$port" --dashboard-agent-listen-port=$((port + 3 + k))
  done
  echo "started in $folder; next: eval \"\$(cluster/local.sh env)\"" >&2
}

stop() {
  if [[ ! -e "$folder/pids" ]]; then
    echo "none is running in $folder" >&2
    return
  fi
  while read -r pid; do
    kill -TERM -- "-$pid" 2> /dev/null || true
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
