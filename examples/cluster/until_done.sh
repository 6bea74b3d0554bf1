# Defines `until_done COMMAND ...`, which runs a command and tells an end from a stop: a run that SIGTERM stops writes a
# checkpoint and exits with 0, as one that is complete does. Here the first of them exits with 75 (try again later).
# As a program, `bash until_done.sh COMMAND ...` does the same.
# shellcheck shell=bash
until_done() {
    local stopped="" code
    trap 'stopped=yes; kill -TERM "$run"' TERM
    "$@" &
    run=$!
    wait "$run"
    code=$?
    while kill -0 "$run" 2>/dev/null; do # a signal has ended `wait`, and the run is writing its checkpoint
        wait "$run"
        code=$?
    done
    if [[ "$stopped" && "$code" -eq 0 ]]; then
        code=75
    fi
    return "$code"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    until_done "$@"
fi
