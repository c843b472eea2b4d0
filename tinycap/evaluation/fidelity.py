"""How faithfully the student reproduces its teacher's embeddings.

CLIP's embeddings lie in a narrow cone, so that cosine distance alone flatters: a constant vector comes close to all of
them. It is reported beside that constant vector, the cosine after centring, and retrieval.
"""

import torch
import torch.nn.functional as F


# Rows of similarities held at once.
CHUNK = 1024


@torch.no_grad()
def distillation_fidelity(student_embeds: torch.Tensor, teacher_embeds: torch.Tensor) -> dict[str, float]:
    """Compares the embeddings of the same N pictures.

    Args:
        student_embeds: (N, D); teacher_embeds: (N, D); of any norm.

    Returns:
        `cosine_distance`, the mean of 1 - cos; `constant_cosine_distance`, that of the best constant vector (the
        direction of the teacher's mean); `centered_cosine`, the mean cosine after each side's mean is taken away;
        `recall_at_1` and `recall_at_5`, how often (%) the picture's own teacher embedding is the student's nearest, or
        among the five nearest, of all N.

    Raises:
        ValueError: the shapes differ, or there is no picture.
    """
    if student_embeds.shape != teacher_embeds.shape or student_embeds.dim() != 2 or not len(student_embeds):
        raise ValueError(
            f"expected two (N, D) tensors of embeddings, got {tuple(student_embeds.shape)} of the student and "
            f"{tuple(teacher_embeds.shape)} of the teacher"
        )
    student, teacher = F.normalize(student_embeds.double(), dim=-1), F.normalize(teacher_embeds.double(), dim=-1)
    constant = F.normalize(teacher.mean(dim=0), dim=-1)
    centered = F.cosine_similarity(student - student.mean(dim=0), teacher - teacher.mean(dim=0), dim=-1)
    ranks = []
    for start in range(0, len(student), CHUNK):
        rows = student[start : start + CHUNK]
        own = (rows * teacher[start : start + CHUNK]).sum(dim=-1, keepdim=True)
        # Ties count against the student: a constant one must not find everything. Rounding makes no tie.
        ranks.append((rows @ teacher.t() >= own - 1e-12).sum(dim=1))
    ranks = torch.cat(ranks)
    return {
        "cosine_distance": (1 - (student * teacher).sum(dim=-1)).mean().item(),
        "constant_cosine_distance": (1 - teacher @ constant).mean().item(),
        "centered_cosine": centered.mean().item(),
        "recall_at_1": 100 * (ranks <= 1).double().mean().item(),
        "recall_at_5": 100 * (ranks <= 5).double().mean().item(),
    }
