"""Pretraining methods. `METHODS` is the only list of them: a new one needs its file and one line here."""

from detco.methods.base import Method
from detco.methods.detco import DetCo
from detco.methods.moco import MoCoV2
from detco.methods.soco import SoCoC4, SoCoFPN, SoCoFPNStar

METHODS: dict[str, type[Method]] = {
    "detco": DetCo,
    "moco_v2": MoCoV2,
    "soco_c4": SoCoC4,
    "soco_fpn": SoCoFPN,
    "soco_fpn_star": SoCoFPNStar,
}
