#!/usr/bin/env bash
# Starts a local S3 (SeaweedFS) on 127.0.0.1 and stays in the foreground; see README.md beside this file.
# usage: start.sh FOLDER [PORT]
set -euo pipefail

folder=${1:?usage: start.sh FOLDER [PORT]}
port=${2:-8333}
: "${AWS_ACCESS_KEY_ID:?set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: the server takes them as its only account}"
: "${AWS_SECRET_ACCESS_KEY:?set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: the server takes them as its only account}"

mkdir -p "$folder"
# -ip.bind: the default listens on every interface. -master.telemetry: the default reports to the makers.
# -s3.autoCreateBucket: a misspelt bucket must be an error here as it is on other S3 services.
exec weed mini -dir="$folder" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false \
  -admin.ui=false -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 -s3.autoCreateBucket=false \
  -s3.port="$port" -master.port=$((port + 1)) -volume.port=$((port + 2)) -filer.port=$((port + 3)) \
  -admin.port=$((port + 4)) -bucket=echovideo
