#!/bin/sh
# Generates the checked-in stubs in dedupv1/ from protos/ with pinned generators.
#
#   ./generate.sh          write the stubs
#   ./generate.sh --check  print a diff and fail if the stubs are stale
#
# PROTOC is the compiler command. The default is grpcio-tools in the repository's .venv.
set -eu

protoc_gen_go=v1.36.12
protoc_gen_go_grpc=v1.6.2

cd "$(dirname "$0")"
module=github.com/dedup-service/dedup-service/clients/go
protoc=${PROTOC:-../../.venv/bin/python -m grpc_tools.protoc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

GOBIN=$work/bin go install "google.golang.org/protobuf/cmd/protoc-gen-go@$protoc_gen_go"
GOBIN=$work/bin go install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$protoc_gen_go_grpc"

mkdir "$work/out"
# Unquoted, because $protoc may be a command with arguments.
# shellcheck disable=SC2086
PATH=$work/bin:$PATH $protoc -I ../../protos \
    --go_out="$work/out" --go_opt="module=$module" \
    --go-grpc_out="$work/out" --go-grpc_opt="module=$module" \
    dedup/v1/dedup.proto

if [ "${1:-}" = --check ]; then
    diff -r "$work/out/dedupv1" dedupv1 || { echo "clients/go/dedupv1 is stale: run clients/go/generate.sh" >&2; exit 1; }
else
    mkdir -p dedupv1
    rm -f dedupv1/*.pb.go
    cp "$work"/out/dedupv1/*.go dedupv1/
fi
