"""libertem-live's DECTRIS simulator on a file of Stream V1 messages. Runs in the environment ``.peers/libertem``.

Says the ports of its REST interface and of its stream, then runs until it is killed.
"""

from __future__ import annotations

import time

from libertem_live.detectors.dectris.sim import DectrisSim
from measuring import answer, arguments

if __name__ == "__main__":
    simulator = DectrisSim(path=arguments()["stream"], port=0, zmqport=0, verbose=False)
    simulator.start()
    simulator.wait_for_listen()
    answer(api_port=simulator.port, stream_port=simulator.zmqport)
    while True:
        time.sleep(1)
        simulator.maybe_raise()
