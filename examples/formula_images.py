"""Labelled images drawn by formula: a class is one set of formula parameters, its instances are
random perturbations of it. No picture enters; every pixel is computed from random numbers.

  strokes    handwriting-like figures: curves integrated from their curvature, with corners
  contours   nested closed curves around a centre
  fractals   attractors of iterated function systems
  textures   sums of warped plane waves

Each family is a function (draw, classes, instances, side) -> images (classes * instances, 3, side,
side) in [0, 1], the instances of a class side by side.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

TAU = 2 * math.pi


# ---- Random numbers: one generator per step, so that a resumed run draws what it would have ----


class Draw:
    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def chance(self, p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def integer(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)


def repeat(parameters: dict[str, Tensor], instances: int) -> dict[str, Tensor]:
    return {key: value.repeat_interleave(instances, 0) for key, value in parameters.items()}


def pixel_grid(side: int) -> Tensor:
    """(side * side, 2): pixel centres (x, y) in [-1, 1]."""
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


# ---- Strokes ----

STROKES, SEGMENTS, POINTS = 3, 4, 16  # at most 3 strokes of 4 segments, 16 points drawn on each


def stroke_classes(draw: Draw, classes: int) -> dict[str, Tensor]:
    """The plan of a figure: per segment its length, its turn and the corner before it."""
    shape = (classes, STROKES, SEGMENTS)
    count = 1 + draw.chance(0.4, classes) + draw.chance(0.15, classes)
    used = draw.integer(1, SEGMENTS, classes, STROKES)
    alive = torch.arange(SEGMENTS) < used[..., None]
    alive &= (torch.arange(STROKES) < count[:, None])[..., None]
    sign = torch.where(draw.chance(0.5, *shape), 1.0, -1.0)
    curved, cornered = draw.chance(0.7, *shape), draw.chance(0.4, *shape)
    return {
        "length": draw.uniform(*shape, low=0.35, high=1.2) * alive,
        "turn": sign * draw.uniform(*shape, low=0.4, high=4.5) * curved,
        "corner": draw.uniform(*shape, low=-2.8, high=2.8) * cornered,
        "heading": draw.uniform(classes, STROKES, high=TAU),
        "anchor": draw.uniform(classes, STROKES),
        "offset": draw.normal(classes, STROKES, 2, std=0.3),
    }


def with_siblings(draw: Draw, parents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Doubles the classes: each gets a sibling that differs from it in some segments only."""
    other = stroke_classes(draw, len(parents["heading"]))
    shape = parents["turn"].shape
    swapped = {
        "length": draw.chance(0.15, *shape),
        "turn": draw.chance(0.25, *shape),
        "corner": draw.chance(0.2, *shape),
    }
    keep = torch.zeros(())
    return {
        key: torch.cat([value, torch.where(swapped.get(key, keep) > 0, other[key], value)])
        for key, value in parents.items()
    }


def stroke_points(draw: Draw, plan: dict[str, Tensor], vigour: float) -> tuple[Tensor, Tensor]:
    """One hand's execution of each plan: points (n, p, 2) and which of them are drawn (n, p)."""
    n = len(plan["heading"])
    shape = (n, STROKES, SEGMENTS)
    length = plan["length"] * draw.normal(*shape, std=0.3 * vigour).exp()
    turn = plan["turn"] * draw.normal(*shape, std=0.2 * vigour).exp()
    turn = turn + draw.normal(*shape, std=0.2 * vigour)
    corner = plan["corner"] + draw.normal(*shape, std=0.15 * vigour)
    heading = plan["heading"] + draw.normal(n, STROKES, std=0.15 * vigour)
    # A corner turns at the first point of its segment, a turn is spread over all points.
    turning = (turn / POINTS)[..., None].repeat(1, 1, 1, POINTS)
    turning[..., 0] += corner
    angle = heading[..., None] + turning.flatten(2).cumsum(-1)
    stride = (length / POINTS).repeat_interleave(POINTS, -1)
    path = (torch.stack([angle.cos(), angle.sin()], -1) * stride[..., None]).cumsum(2)
    path = path + starts(draw, plan, path[:, 0], vigour)[:, :, None]
    return path.flatten(1, 2), (stride > 0).flatten(1)


def starts(draw: Draw, plan: dict[str, Tensor], first: Tensor, vigour: float) -> Tensor:
    """(n, STROKES, 2): the first stroke begins at the origin, later ones near a point of it."""
    n = len(first)
    last = (plan["length"][:, :1] > 0).sum(-1) * POINTS - 1
    along = (plan["anchor"] + draw.normal(n, STROKES, std=0.06 * vigour)).clamp(0, 1)
    near = first.gather(1, (along * last).long()[..., None].expand(-1, -1, 2))
    near = near + plan["offset"] + draw.normal(n, STROKES, 2, std=0.06 * vigour)
    near[:, 0] = 0
    return near


def smooth_warp(draw: Draw, points: Tensor, strength: float) -> Tensor:
    """Elastic deformation: a sum of random low-frequency waves displaces the points."""
    n, waves = len(points), 3
    frequency = draw.normal(n, waves, 2, std=2.0)
    phase = draw.uniform(n, 1, waves, high=TAU)
    push = draw.normal(n, waves, 2, std=strength)
    return points + (points @ frequency.transpose(1, 2) + phase).sin() @ push


def fit_box(points: Tensor, drawn: Tensor, half: Tensor) -> Tensor:
    """Centres the drawn points and scales them to the half extents (n, 2) of a box, the aspect
    kept where the figure is narrower than the box."""
    far = torch.where(drawn, 0.0, torch.inf)[..., None]
    low, high = (points + far).amin(1), (points - far).amax(1)
    extent = ((high - low) / 2).clamp_min(1e-2)
    fill = half / extent
    scale = torch.stack([torch.minimum(fill[:, 0], fill[:, 1]), fill[:, 1]], -1)
    scale[:, 1] = torch.minimum(fill[:, 1], 2.5 * scale[:, 0])
    return (points - ((low + high) / 2)[:, None]) * scale[:, None]


def strokes(draw: Draw, classes: int, instances: int, side: int, vigour: float) -> Tensor:
    """Handwriting-like figures, white on black; vigour scales what differs between hands."""
    plan = repeat(with_siblings(draw, stroke_classes(draw, classes // 2)), instances)
    points, drawn = stroke_points(draw, plan, vigour)
    points = smooth_warp(draw, fit_box(points, drawn, torch.ones(len(points), 2)), 0.06 * vigour)
    points = slant(draw, points, vigour)
    radius = draw.uniform(len(points), 1, low=0.1, high=0.3)
    width = draw.uniform(len(points), 1, low=0.5, high=0.85)
    height = draw.uniform(len(points), 1, low=0.9, high=1.0)
    points = fit_box(points, drawn, torch.cat([width, height], 1) - 0.8 * radius)
    points = points + draw.normal(len(points), 1, 2, std=0.04)
    image = scan(draw, ink(points, drawn, radius), side)
    return (image * draw.uniform(len(image), 1, 1, 1, low=0.7, high=1.0)).expand(-1, 3, -1, -1)


def slant(draw: Draw, points: Tensor, vigour: float) -> Tensor:
    n = len(points)
    angle, shear = draw.normal(n, std=0.12 * vigour), draw.normal(n, std=0.25 * vigour)
    affine = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], -1)
    return points @ affine.view(n, 2, 2).transpose(1, 2)


FINE = 16  # pixels a side of the first, fine raster


def ink(points: Tensor, drawn: Tensor, radius: Tensor) -> Tensor:
    """(n, 1, FINE, FINE): 1 where a drawn point is nearer than the radius, one pixel of edge."""
    square = nearest_square(torch.where(drawn[..., None], points, 9.0), pixel_grid(FINE))
    covered = (0.5 + (radius - square.clamp_min(0).sqrt()) * FINE / 2).clamp(0, 1)
    return covered.view(-1, 1, FINE, FINE)


def scan(draw: Draw, fine: Tensor, side: int) -> Tensor:
    """Three of four figures are scanned at half the resolution in 17 greys, then enlarged."""
    coarse = (functional.avg_pool2d(fine, 2) * 16).round() / 16
    chosen = draw.chance(0.75, len(fine))[:, None, None, None]
    return torch.where(chosen, enlarge(coarse, side), enlarge(fine, side))


def nearest_square(points: Tensor, grid: Tensor) -> Tensor:
    """Squared distance (n, g) of each grid point to the nearest of each figure's points."""
    lifted = torch.cat([points, points.square().sum(-1, keepdim=True)], -1)
    plane = torch.cat([-2 * grid, torch.ones(len(grid), 1)], -1).T
    # A few figures at a time: the product stays in the cache.
    nearest = [(few @ plane).amin(1) for few in lifted.split(4)]
    return torch.cat(nearest) + grid.square().sum(-1)


def enlarge(image: Tensor, side: int) -> Tensor:
    # antialias=True selects Pillow's cubic (a = -0.5).
    return functional.interpolate(
        image, (side, side), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)


# ---- Contours, fractals, textures ----


def contours(draw: Draw, classes: int, instances: int, side: int) -> Tensor:
    """Nested closed curves r(angle) = 1 + sum_k a_k cos(k angle + phase_k)."""
    harmonics = torch.arange(1, 8)
    plan = repeat(
        {
            "amplitude": draw.normal(classes, 7, std=0.35) / harmonics.sqrt(),
            "phase": draw.uniform(classes, 7, high=TAU),
            "rings": draw.uniform(classes, 1, low=0.5, high=3.0),
        },
        instances,
    )
    n = len(plan["rings"])
    points = smooth_warp(draw, pixel_grid(side).expand(n, -1, -1), 0.05)
    points = (points + draw.normal(n, 1, 2, std=0.1)) * draw.normal(n, 1, 2, std=0.15).exp()
    angle = torch.atan2(points[..., 1], points[..., 0]) + draw.normal(n, 1, std=0.15)
    amplitude = plan["amplitude"] * draw.normal(n, 7, std=0.2).exp()
    wave = (angle[..., None] * harmonics + plan["phase"][:, None]).cos()
    curve = 0.6 + 0.6 * (wave @ amplitude[..., None]).squeeze(-1)
    level = (points.norm(dim=-1) - curve) * plan["rings"] * TAU
    image = (level.cos() * draw.uniform(n, 1, low=1.5, high=5)).sigmoid().view(n, 1, side, side)
    return paint(draw, image)


def fractals(draw: Draw, classes: int, instances: int, side: int) -> Tensor:
    """Attractors of four affine maps, by the chaos game; brightness is the logarithm of density."""
    maps, steps, walkers = 4, 24, 64
    plan = repeat(
        {
            "matrix": draw.normal(classes, maps, 2, 2, std=0.45),
            "shift": draw.uniform(classes, maps, 2, low=-1, high=1),
        },
        instances,
    )
    n = len(plan["shift"])
    matrix = plan["matrix"] + draw.normal(n, maps, 2, 2, std=0.05)
    matrix = matrix * (0.75 / torch.linalg.matrix_norm(matrix, 2)).clamp_max(1)[..., None, None]
    shift = plan["shift"] + draw.normal(n, maps, 2, std=0.08)
    rows = torch.arange(n)[:, None]
    position, trail = draw.normal(n, walkers, 2, std=0.3), []
    for step in range(steps):
        pick = draw.integer(0, maps - 1, n, walkers)
        position = (matrix[rows, pick] @ position[..., None]).squeeze(-1) + shift[rows, pick]
        if step >= 8:
            trail.append(position)
    cloud = torch.cat(trail, 1)
    cloud = fit_box(cloud, torch.ones(cloud.shape[:2], dtype=torch.bool), torch.full((n, 2), 0.95))
    cell = ((cloud + 1) * side / 2).long().clamp(0, side - 1)
    count = torch.zeros(n, side * side)
    count.scatter_add_(1, cell[..., 1] * side + cell[..., 0], torch.ones(cell.shape[:2]))
    image = count.log1p() / count.log1p().amax(1, keepdim=True)
    return paint(draw, image.view(n, 1, side, side))


def textures(draw: Draw, classes: int, instances: int, side: int) -> Tensor:
    """Warped plane waves; direction and frequency are the class, phases are the instance."""
    waves = 3
    plan = repeat({"frequency": draw.normal(classes, waves, 2, std=7.0)}, instances)
    n = len(plan["frequency"])
    points = smooth_warp(draw, pixel_grid(side).expand(n, -1, -1), 0.08)
    phase = draw.uniform(n, 1, waves, high=TAU)
    value = (points @ plan["frequency"].transpose(1, 2) + phase).sin().sum(-1)
    sharp = draw.uniform(n, 1, low=0.7, high=4)
    return paint(draw, (value * sharp).sigmoid().view(n, 1, side, side))


def paint(draw: Draw, image: Tensor) -> Tensor:
    """Between two random colours."""
    ground, figure = draw.uniform(2, len(image), 3, 1, 1)
    return ground + (figure - ground) * image
