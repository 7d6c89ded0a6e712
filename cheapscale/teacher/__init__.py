"""The teacher that all three methods start from, and what shares its face."""

from cheapscale.teacher.experts import Experts
from cheapscale.teacher.load import load, load_teacher
from cheapscale.teacher.teacher import Generator, Teacher

__all__ = ["Experts", "Generator", "Teacher", "load", "load_teacher"]
