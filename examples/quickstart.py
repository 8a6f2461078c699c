"""One device in a few lines: keep private examples, learn with a server, predict.

edge-export bundle minilm -o runs/minilm
edge-server serve --config examples/quickstart.toml --bundle runs/minilm --data runs/quickstart-server &
python examples/quickstart.py http://127.0.0.1:8440
"""

import sys

from edge_sdk import EdgeDevice

device = EdgeDevice("runs/quickstart-device", server=sys.argv[1])
device.add("what a lovely film", label="positive")
device.add("dull from start to end", label="negative")
device.add("I have seen it twice")  # nobody has labelled this one
device.learn()
for prediction in device.predict(["a great evening", "not for me"]):
    print(f"{prediction.label}: {prediction.text}")
