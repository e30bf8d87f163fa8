"""Solve lattices with the Triton kernels on the CPU; run by test_rnnt_triton.py.

    TRITON_INTERPRET=1 python -m tests.losses.interpret_rnnt_triton PROBLEMS ANSWERS

A process of its own, for Triton reads the variable when it is imported.
"""

import sys

import torch

from mvqkd.losses import rnnt, rnnt_triton


def main(problems_file: str, answers_file: str) -> None:
    rnnt._walk_lattice = rnnt_triton.walk_lattice
    answers = {}
    for name, problem in torch.load(problems_file).items():
        px, py = problem["px"].requires_grad_(), problem["py"].requires_grad_()
        boundary = problem["boundary"]
        score, occupations = rnnt.mutual_information_recursion(
            px, py, boundary, return_grad=True, backend="native"
        )
        score.sum().backward()
        with torch.no_grad():
            alone = rnnt.mutual_information_recursion(px, py, boundary, backend="native")
        answers[name] = (score.detach(), *occupations, px.grad, py.grad, alone)
    torch.save(answers, answers_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
