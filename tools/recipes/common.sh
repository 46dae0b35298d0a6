# Sourced by the recipes: their settings, each an environment variable whose default is the demo's, and what they share.
# Paths are seen from the project's root. On text of your own, a run worth judging takes hundreds of steps.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v distill-train >/dev/null || PATH="$PWD/.venv/bin:$PATH"
if ! command -v distill-train >/dev/null; then
    echo "Error: distill-train was not found; type tools/demo once, which makes .venv" >&2
    exit 2
fi

OUT=${OUT:-.demo/recipes/$(basename "$0")}       # a new folder for all that the recipe makes
if [ -e "$OUT" ]; then
    echo "Error: $OUT is there already; type rm -r $OUT, or OUT=FOLDER before the command" >&2
    exit 2
fi
if [ -z "${TEACHER:-}" ]; then                   # an mlx-lm folder, a .gguf file or a hub id
    mkdir -p .demo
    TEACHER=$(python tools/demo_data.py .demo)
fi
STUDENT=${STUDENT:-$TEACHER}                     # what students are cut from; STUDENT_LAYERS= does not cut
TRAIN=${TRAIN:-.demo/train.jsonl}                # .jsonl files
HELD_OUT=${HELD_OUT:-.demo/heldout.jsonl}
DOCUMENTS=${DOCUMENTS:-32}                       # of TRAIN, its first
MAX_SEQ_LENGTH=${MAX_SEQ_LENGTH:-96}             # tokens of a document
STEPS=${STEPS:-16}                               # of a training run
BATCH_SIZE=${BATCH_SIZE:-2}
LEARNING_RATE=${LEARNING_RATE:-3e-4}
DATA=$OUT/train.jsonl

run() { echo; echo "\$ $*"; "$@"; }

# build NAME FLAGS...: a store of a teacher's answers on the training data.
build() {
    run logitstore build --quiet --dataset "$DATA" --max-seq-length "$MAX_SEQ_LENGTH" --out "$OUT/$1" "${@:2}"
}

# train NAME FLAGS...: a student; with STEPS=0 before it as it is untrained, with DATA=FILE on other data.
train() {
    run distill-train --quiet --dataset "$DATA" --max-seq-length "$MAX_SEQ_LENGTH" \
        --batch-size "$BATCH_SIZE" --learning-rate "$LEARNING_RATE" --iters "$STEPS" --out "$OUT/$1" "${@:2}"
}

# evaluate NAME FLAGS...: a student on the held-out text, kept as NAME.json.
evaluate() {
    run distill-eval --quiet --dataset "$HELD_OUT" --max-seq-length "$MAX_SEQ_LENGTH" --json "$OUT/$1.json" "${@:2}"
}

# compare FIGURE NAME...: all of them in a table, and whether the last is better than those before it.
compare() {
    run python tools/recipes/compare.py "$1" "$OUT" "${@:2}"
    echo "$(basename "$0") took $SECONDS s"
}

for file in "$TRAIN" "$HELD_OUT"; do
    if [ ! -f "$file" ]; then
        echo "Error: no file $file; type TRAIN=FILE.jsonl and HELD_OUT=FILE.jsonl before the command" >&2
        exit 2
    fi
done
mkdir -p "$OUT"
head -n "$DOCUMENTS" "$TRAIN" >"$DATA"
