#!/usr/bin/env bash
# A real object store for the tests: Ceph's RadosGW over one monitor and one OSD, on 127.0.0.1, as root, no systemd.
#
#   eval "$(start-s3.sh start)"   a fresh, empty store; installs Debian's packages on first use; prints `export …`
#   start-s3.sh kill              the gateway dies at once, as in a power cut; what it has acknowledged stays
#   start-s3.sh revive            the gateway is back, at the same address
#   start-s3.sh freeze | thaw     the gateway takes connections and does not answer | continues
#   start-s3.sh stop              everything ends, by the pids that were kept, and the data goes
#
# Environment: S3_STORE_DIR, an absolute folder (build/s3).
set -euo pipefail

home=${S3_STORE_DIR:-$PWD/build/s3}
conf=$home/ceph.conf
key=test-key secret=test-secret-of-no-worth
packages="ceph-mon ceph-osd radosgw curl"

log() { echo "start-s3: $*" >&2; }

# The pid of a daemon of this store, if it is running: a pid file may be old, and its number somebody else's by now.
pid_of() {
  local file=$home/run/$1.pid
  [[ -s $file ]] && tr '\0' '\n' <"/proc/$(<"$file")/cmdline" 2>/dev/null | grep -qxF -- "$conf" && cat "$file"
}

# end NAME SIGNAL: send it, wait ten seconds, then SIGKILL.
end() {
  local pid
  pid=$(pid_of "$1") || return 0
  kill "-$2" "$pid"
  for _ in {1..100}; do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  ! kill -9 "$pid" 2>/dev/null || sleep 0.2
  rm -f "$home/run/$1.pid"
}

stop() {
  end client.rgw KILL # nothing of it is needed any more, and it takes its time otherwise
  end osd.0 KILL
  end mon.a KILL
  rm -rf "${home:?}"
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

install_packages() {
  type radosgw radosgw-admin ceph-mon ceph-osd curl >/dev/null 2>&1 && return
  if [[ $(id -u) != 0 ]] || ! type apt-get >/dev/null 2>&1; then
    log "needs $packages; install them (as root on Debian they are installed here)"
    exit 1
  fi
  log "installing $packages"
  apt-get update -q >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $packages >&2
}

configure() {
  local fsid=$1 monitor_port=$2 gateway_port=$3
  # The watch timeout: a gateway that was killed is missed by the next one until then.
  cat >"$conf" <<END
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$monitor_port/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
mon allow pool size one = true
run dir = $home/run
admin socket = $home/run/\$name.asok
pid file = $home/run/\$name.pid
log file = $home/log/\$name.log
mon cluster log file = $home/log/cluster.log
mon data = $home/mon
osd data = $home/osd
bluestore block size = 8589934592
osd pool default size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd client watch timeout = 5
rgw frontends = beast endpoint=127.0.0.1:$gateway_port
END
  echo "http://127.0.0.1:$gateway_port" >"$home/endpoint"
}

gateway() {
  timeout 90 radosgw -c "$conf" -n client.rgw >>"$home/log/start.log" 2>&1 </dev/null
  for _ in {1..300}; do
    curl -sfo /dev/null "$(<"$home/endpoint")/" && return
    sleep 0.1
  done
  log "the gateway does not answer; see $home/log"
  exit 1
}

create() {
  local fsid osd monitor_port
  fsid=$(</proc/sys/kernel/random/uuid) osd=$(</proc/sys/kernel/random/uuid) monitor_port=$(free_port)
  mkdir -p "$home"/{mon,osd,run,log}
  configure "$fsid" "$monitor_port" "$(free_port)"
  {
    ceph-authtool --create-keyring "$home/keyring" --gen-key -n mon. --cap mon 'allow *'
    monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$monitor_port]" "$home/monmap"
    ceph-mon -c "$conf" --mkfs -i a --monmap "$home/monmap" --keyring "$home/keyring"
    ceph-mon -c "$conf" -i a
    timeout 30 ceph -c "$conf" osd new "$osd" 0
    ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd"
    ceph-osd -c "$conf" -i 0
    timeout 60 radosgw-admin -c "$conf" user create --uid=tests --display-name=tests \
      "--access-key=$key" "--secret-key=$secret"
    # Clients name the region us-east-1, which this makes the store's own.
    timeout 60 radosgw-admin -c "$conf" zonegroup modify --rgw-zonegroup=default --api-name=us-east-1
  } >>"$home/log/start.log" 2>&1 </dev/null
}

case ${1:-} in
  start)
    install_packages
    stop
    trap 'log "did not start: $(tail -n 3 "$home/log/start.log" 2>/dev/null)"; stop' ERR
    create
    gateway
    echo "export S3_STORE_DIR=$home AWS_ENDPOINT_URL=$(<"$home/endpoint") AWS_DEFAULT_REGION=us-east-1" \
      "AWS_ACCESS_KEY_ID=$key AWS_SECRET_ACCESS_KEY=$secret"
    ;;
  kill) end client.rgw KILL ;;
  revive) gateway ;;
  freeze) kill -STOP "$(pid_of client.rgw)" ;;
  thaw) kill -CONT "$(pid_of client.rgw)" ;;
  stop) stop ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
