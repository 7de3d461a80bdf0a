#!/bin/sh
# Stands in for `ipset restore` in tests: refuses 192.0.2.66 to .69 and then forgets the whole batch, as ipset may.
# Everything it took is in the file `applied` beside the name it was called by.
dir=$(dirname "$0")
cat > "$dir/batch"
line=$(grep -n '192\.0\.2\.6[6-9] ' "$dir/batch" | head -n 1 | cut -d : -f 1)
if [ -n "$line" ]; then
    echo "ipset v7.17: Error in line $line: refused on purpose" >&2
    exit 1
fi
cat "$dir/batch" >> "$dir/applied"
