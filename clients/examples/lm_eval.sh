#!/usr/bin/env bash
# EleutherAI's lm-evaluation-harness against demur, through its model type local-chat-completions.
#
#   pip install 'lm-eval[api]' ./clients
#   bash clients/examples/lm_eval.sh
#   bash clients/examples/lm_eval.sh --tasks gsm8k --limit 50     # tasks of lm-eval's own
#
# lm-eval sends a seed with temperature 0, where nothing is drawn; demur takes it.
set -euo pipefail
url=${DEMUR_BASE_URL:-http://127.0.0.1:8000}
here=$(cd "$(dirname "$0")/lm_eval" && pwd)
cd "$here"  # the task names its data relative to it
export OPENAI_API_KEY=${DEMUR_API_KEY:-none}
model=${DEMUR_MODEL:-$(python -c "from demur import Client; print(Client('$url').models()[0].id)")}
exec lm_eval --model local-chat-completions \
  --model_args "model=$model,base_url=$url/v1/chat/completions,num_concurrent=8,max_retries=2" \
  --include_path "$here" --tasks demur_sums --apply_chat_template "$@"
