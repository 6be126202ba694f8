#!/usr/bin/env bash
# Scan $MODEL, keep the exit code as an output, put the report in the job's summary, and fail as the code says.
set -u -o pipefail

markdown="$(mktemp -d)/summary.md"
code=0
qcbguard scan "$MODEL" --for "$FORMATS" --sarif "$SARIF" --html "$HTML" --markdown "$markdown" || code=$?

echo "exit-code=$code" >> "$GITHUB_OUTPUT"
if [ -f "$markdown" ]; then
  cat "$markdown" >> "$GITHUB_STEP_SUMMARY"
fi
if [ "$code" -eq 3 ] && [ "$ALLOW_INCOMPLETE" = "true" ]; then
  echo "::warning::qcbguard could not test every tensor of $MODEL"
  exit 0
fi
exit "$code"
