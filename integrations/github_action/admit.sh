#!/usr/bin/env bash
# Admit $MODEL, or refuse it: scan its full-precision weights, verify its codes, leave claims about both in $CLAIMS.
# Whatever is not a clean result refuses it: a finding (1), an error (2), what could not be tested (3), wrong usage (4).
# $BASE is the guarded folder that a quantized $MODEL was made from; empty where $MODEL is that folder itself.
set -u -o pipefail

if [ -e "$CLAIMS" ]; then
  echo "::error::$CLAIMS exists already: claims of another run must not admit this model"
  exit 2
fi
plan=()
if [ -n "${BASE:-}" ]; then
  plan=(--plan "$BASE")
fi
scan=0
qcbguard scan "${BASE:-$MODEL}" --for "$FORMATS" --attest "$CLAIMS" || scan=$?
verify=0
qcbguard verify "$MODEL" ${plan[@]+"${plan[@]}"} --attest "$CLAIMS" || verify=$?

code=$scan
if [ "$code" -eq 0 ]; then
  code=$verify
fi
if [ "$code" -eq 0 ] && [ "$(wc -l < "$CLAIMS")" -ne 2 ]; then
  echo "::error::there are not two claims about $MODEL"
  code=2
fi
echo "exit-code=$code" >> "$GITHUB_OUTPUT"
echo "$MODEL: scan exited with $scan, verify with $verify: $([ "$code" -eq 0 ] && echo admitted || echo refused)" \
  | tee -a "$GITHUB_STEP_SUMMARY"
exit "$code"
