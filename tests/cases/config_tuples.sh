# Tuple fields that are given something else. Expected: exit code 2 and one line that names the flag.
: ${CLONE:=$PWD} ${PY:=$CLONE/.venv/bin/python}; cd $CLONE
t() { row=$1; shift; out=$($PY scripts/train.py --config=configs/digits.py:$row --dry_run "$@" 2>&1); rc=$?; if [ $rc = 2 ] && ! grep -q Traceback <<<"$out"; then echo "HOLDS $* exit $rc"; else echo "FAILS $* exit $rc: $(tail -1 <<<"$out" | cut -c1-100)"; fi; }
for a in ema=abc ema= ema_widths=a,b sample_steps= sample_steps=a sample_steps=1,2.5 network.attention_resolutions=a; do t lagrangian,smoke --config.$a; done
t straightening,smoke --config.init_from=assets/digits --config.teacher=assets/digits --config.objective.steps=2.5
t straightening,smoke --config.init_from=assets/digits --config.teacher=assets/digits --config.trajectories.grid=given --config.trajectories.times=a,b
