#!/bin/sh
# SageMaker starts the server with nothing but environment variables: its names for our options.
set -eu

: "${HF_MODEL_ID:?HF_MODEL_ID must be set}"
export MODEL_ID="$HF_MODEL_ID"
if [ -n "${HF_MODEL_REVISION:-}" ]; then export REVISION="$HF_MODEL_REVISION"; fi
if [ -n "${SM_NUM_GPUS:-}" ]; then export NUM_SHARD="$SM_NUM_GPUS"; fi
if [ -n "${HF_MODEL_QUANTIZE:-}" ]; then export QUANTIZE="$HF_MODEL_QUANTIZE"; fi
if [ -n "${HF_MODEL_TRUST_REMOTE_CODE:-}" ]; then export TRUST_REMOTE_CODE="$HF_MODEL_TRUST_REMOTE_CODE"; fi

exec text-generation-launcher --port 8080 "$@"
