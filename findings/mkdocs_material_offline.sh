#!/usr/bin/env bash
# Material for MkDocs: a site that is read from a folder asks a server for a script; folders that are left out at any depth.
#
# Guess 1: with the plugin `offline` a site asks the network for nothing. Seen: every page loads a script from unpkg.com,
# without which search from a file does not work, as browsers start no worker there. Way out: a polyfill of one's own whose
# name has `iframe-worker` in it takes its place.
#
# Guess 2: `exclude_docs: tools/` leaves out the folder tools beside the pages. Seen: it leaves out folders of that name at any
# depth, pages that a hook generates too, and a strict build says nothing. Way out: `/tools/`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mkdocs==1.6.1 mkdocs-material==9.8.2
cd "$folder"
mkdir -p docs/other/tools docs/javascripts
echo '# Start' > docs/index.md
echo '# Deep' > docs/other/tools/deep.md
echo '// ours' > docs/javascripts/iframe-worker.js
export NO_MKDOCS_2_WARNING=1
build() {
    printf 'site_name: s\ntheme: {name: material, font: false}\nplugins: [search, offline]\n%s\n' "$1" > mkdocs.yml
    venv/bin/mkdocs build --quiet --strict
}
build ''
echo "the plugin alone: $(grep -o 'https://unpkg[^"]*' site/index.html | sort -u)"
build 'extra: {polyfills: [javascripts/iframe-worker.js]}'
echo "with a polyfill: unpkg stands on $(grep -l unpkg site/index.html | wc -l) pages"
build 'exclude_docs: tools/'
echo "exclude_docs: tools/   other/tools/deep.html: $(ls site/other/tools/deep.html 2> /dev/null || echo none)"
build 'exclude_docs: /tools/'
echo "exclude_docs: /tools/  other/tools/deep.html: $(ls site/other/tools/deep.html 2> /dev/null || echo none)"
