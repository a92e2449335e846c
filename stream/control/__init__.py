"""The detector beside its stream: what it says of itself, and a scan that is armed from here.

active_scan   DetectorControl, the interface; ActiveScan, one series from arming to disarming
simplon       DECTRIS detectors, over REST
merlin        Merlin, over its control port
choose        which of them a user means
"""

from stream.control.active_scan import (
    ActiveScan,
    DetectorControl,
    DetectorFacts,
    Finished,
    Prepared,
    ScanPlan,
    Trigger,
)

__all__ = ["ActiveScan", "DetectorControl", "DetectorFacts", "Finished", "Prepared", "ScanPlan", "Trigger"]
