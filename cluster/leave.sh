#!/usr/bin/env bash
# Has the trials of a Ray node write a checkpoint: its machine is about to be taken away.
#   cluster/leave.sh [SECONDS [NODE]]          tells Ray, and waits so long (30)
#   cluster/leave.sh --spot [SECONDS [NODE]]   but first waits until AWS says that it takes its spot instance back
set -euo pipefail
if [ "${1:-}" = --spot ]; then
  shift
  metadata=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}/latest
  until token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token") &&
    curl -sf -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"; do
    sleep "${LEAVE_POLL:-5}"
  done
fi
seconds=${1:-30}
ray drain-node ${2:+--node-id "$2"} --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message 'the machine is taken away' --deadline-remaining-seconds "$seconds"
sleep "$seconds"
