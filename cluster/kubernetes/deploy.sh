#!/usr/bin/env bash
# Applies these manifests once every secret has a value; what is given goes to kubectl apply.
set -euo pipefail
cd "$(dirname "$0")"

wrong=0
for example in *.env.example; do
  file=${example%.example}
  if [ ! -f "$file" ]; then
    echo "error: there is no cluster/kubernetes/$file: copy $example and fill it in" >&2
    wrong=1
    continue
  fi
  while IFS='=' read -r name _; do
    if ! grep -q "^$name=." "$file"; then
      echo "error: cluster/kubernetes/$file: $name has no value" >&2
      wrong=1
    fi
  done < "$example"
done
[ "$wrong" = 0 ] || exit 2
exec kubectl apply --kustomize . "$@"
