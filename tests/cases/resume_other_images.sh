# A run is resumed with other images under the same names. docs/training.md: "the SHA-256 of the data".
: ${CLONE:=$PWD} ${PY:=$CLONE/.venv/bin/python}; T=$(mktemp -d); cd $CLONE; mkdir $T/i; export XDG_CACHE_HOME=$T
images() { $PY -c "
import numpy as np; from PIL import Image; g=np.random.default_rng(0)
for i in range(8): Image.fromarray((g.integers(0,255,(16,16,3))*$1).astype(np.uint8)).save('$T/i/%d.png'%i)"; }
run() { $PY scripts/train.py --config=configs/folder.py:flow_matching,smoke --config.network.image_size=16 --config.network.channel_mult=1,2 --config.data.root=$T/i --config.data.workers=0 --workdir=$T/r --config.steps=$1 >$T/log 2>&1; echo $?; }
images 1; run 5 >/dev/null; images 0; rc=$(run 10); [ $rc != 0 ] && echo "HOLDS refused" || echo "FAILS resumes: $(grep -o 'loss=[0-9.]*' $T/log | tail -1)"
