#!/bin/sh
# Stands in for `ipset` in tests: lists what is in the file `listed` beside the name it was called by. Of a batch it refuses
# addresses that end in 66 to 69, and sets for 66, and then forgets the whole batch, as ipset may. Everything it took is in
# the file `applied`.
dir=$(dirname "$0")
case "$*" in list*) exec cat "$dir/listed" ;; esac
cat > "$dir/batch"
line=$(grep -n -e '\.6[6-9] ' -e 'maxelem 66 ' "$dir/batch" | head -n 1 | cut -d : -f 1)
if [ -n "$line" ]; then
    echo "ipset v7.17: Error in line $line: refused on purpose" >&2
    exit 1
fi
cat "$dir/batch" >> "$dir/applied"
