"""percent .py -> executed .ipynb.  build.py SRC DEST [--no-exec] [key=value params injected as env]"""
import sys, re, json, pathlib, time
sys.path.insert(0, ".")
import jupytext, nbformat
from nbclient import NotebookClient
from utils import runtime
src, dest = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).resolve()
text = src.read_text()
text = text.replace("# BADGE", "# " + runtime.badge(dest)).replace("\nBOOTSTRAP\n", "\n" + runtime.BOOTSTRAP_CELL + "\n")
nb = jupytext.reads(text, fmt="py:percent")
nb.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
for i, c in enumerate(nb.cells):
    c["id"] = f"{src.stem}-{i:03d}"
    c.metadata = {k: v for k, v in c.metadata.items() if k == "tags"}
if "--no-exec" not in sys.argv:
    t = time.time()
    times = {}
    client = NotebookClient(nb, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(dest.parent)}}, store_widget_state=False,
        on_cell_start=lambda cell, cell_index: times.__setitem__(cell_index, time.time()),
        on_cell_complete=lambda cell, cell_index: times.__setitem__(cell_index, time.time() - times[cell_index]))
    try: client.execute()
    except Exception as e: print(str(e)[-3000:])
    slow = sorted(((k,v) for k,v in times.items() if v<1e6), key=lambda kv: -kv[1])[:8]
    print("total", round(time.time() - t, 1), [(i, round(s, 1), nb.cells[i].source[:40].replace("\n", " ")) for i, s in slow])
nb.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
for c in nb.cells:
    c.metadata = {k: v for k, v in c.metadata.items() if k == "tags"}
nbformat.validate(nb)
dest.parent.mkdir(parents=True, exist_ok=True)
nbformat.write(nb, dest)
for c in nb.cells:
    for o in c.get("outputs", []):
        if o.output_type == "stream" and o.name == "stderr": print("STDERR:", o.text[:500])
