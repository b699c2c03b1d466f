"""Fine-tuning, beside which eval.py's frozen features are judged: all of a backbone, a head alone,
or low-rank adapters, for whom labels are few and the backbone is good (Surgical-DINO, Cui et al.
2024, adapts DINOv2 so). `eval.py --finetune full head lora` scores them with the same folds.
"""
import copy
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cells import Cells, network_input
from eval import extract_features, held_out, weighted_f1

FEW = 8  # times the lr of all weights, for heads and adapters alone (drawn stripes: of 2 to 20)

class LowRank(nn.Module):
    """LoRA (Hu et al. 2021): a fixed W + up @ down, of rank 8. up is 0 at first."""

    def __init__(self, weight: Tensor, rank: int = 8):
        super().__init__()
        self.down = nn.Parameter(torch.randn_like(weight[:rank]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros_like(weight[:, :rank]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down

def trained_parts(net: nn.Module, kind: str, lr: float, decay: float = 0.75) -> list[dict]:
    """What the optimiser trains of a backbone. full: all, a block's lr `decay` times that of the
    block above, as in BEiT and MAE: what is near the pixels is general. lora: adapters of qkv and
    proj, at FEW lr. head: nothing."""
    net.requires_grad_(kind == "full")
    if kind == "lora":
        for attn in [block.attn for block in net.blocks]:
            for linear in (attn.qkv, attn.proj):
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    top, parts = len(getattr(net, "blocks", ())) + 1, []
    for name, p in net.named_parameters():
        number = re.match(r"blocks\.(\d+)", name)
        layer = int(number[1]) + 1 if number else top * name.startswith("norm")  # 0: the patches
        rate = decay ** (top - layer) if kind == "full" else FEW
        if p.requires_grad:
            parts.append({"params": [p], "lr": lr * rate})
    return parts

def merge(net: nn.Module):
    """Adapters into the weights: a network like any other."""
    for layer in [layer for layer in net.modules() if parametrize.is_parametrized(layer)]:
        parametrize.remove_parametrizations(layer, "weight")

def fine_tune(backbone, crops: Tensor, cells: Cells, train: np.ndarray, test: np.ndarray,
              kind="full", seed=0, epochs=30, lr=5e-4, patience=5, log=print) -> tuple:
    """Train a linear head and, of the backbone, trained_parts, on crops[train], uint8 [n, 3, h, w].
    Keeps the epoch with the best weighted F1 on held_out groups, stops `patience` later (numbers:
    guesses). Returns probabilities of crops[test], the network, adapters merged into its weights,
    and how many numbers were trained."""
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
                          v2.ColorJitter(0.2, 0.2)])
    net, device, truth = copy.deepcopy(backbone), backbone.device, cells.label
    held = held_out(cells.group[train], truth[train], seed)
    fit, check = train[~held], train[held] if held.any() else train
    head = nn.Linear(extract_features(net, crops[:1]).shape[1], len(cells.classes)).to(device)
    rate = lr if kind == "full" else FEW * lr
    parts = [{"params": [p], "lr": rate} for p in head.parameters()] + trained_parts(net, kind, lr)
    optimizer = torch.optim.AdamW(parts, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    both, best, waited, began = nn.ModuleList([net, head]), -1.0, 0, time.monotonic()

    def answers(which):
        with torch.inference_mode():
            return head(extract_features(net, crops[which]).to(device)).softmax(1).cpu()

    while schedule.last_epoch < epochs and waited < patience:
        net.train()
        for some in torch.from_numpy(fit)[torch.randperm(len(fit))].split(64):
            seen = torch.stack([augment(crop) for crop in crops[some]])
            x, y = network_input(seen, (net.size, net.size), device), torch.from_numpy(truth[some])
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(head(net(x)).float(), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        net.eval()
        score, waited = weighted_f1(truth[check], answers(check)), waited + 1
        if score > best:
            best, waited, kept = score, 0, copy.deepcopy(both.state_dict())
        if schedule.last_epoch == 1:
            took = f"{time.monotonic() - began:.0f} s each"
            log(f"fine-tuning ({kind}), {len(fit):,} cells: {epochs} epochs or fewer, {took}")
    both.load_state_dict(kept)
    merge(net)
    return answers(test), net, sum(part["params"][0].numel() for part in parts)
