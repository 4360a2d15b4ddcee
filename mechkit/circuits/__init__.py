"""Circuits: edges between components, their effects (estimated and exact), discovery, and evaluation."""

from mechkit.circuits._evaluation import Constants as Constants
from mechkit.circuits.acdc import acdc as acdc
from mechkit.circuits.areas import FRACTIONS as FRACTIONS
from mechkit.circuits.areas import RocCurve as RocCurve
from mechkit.circuits.areas import cmd as cmd
from mechkit.circuits.areas import cpr as cpr
from mechkit.circuits.areas import roc as roc
from mechkit.circuits.circuit import Circuit as Circuit
from mechkit.circuits.edge_attribution import edge_attribution as edge_attribution
from mechkit.circuits.edge_patching import edge_patching as edge_patching
from mechkit.circuits.edge_scores import EdgeScores as EdgeScores
from mechkit.circuits.edge_scores import ScoredEdge as ScoredEdge
from mechkit.circuits.evaluation import CircuitReport as CircuitReport
from mechkit.circuits.evaluation import evaluate_circuit as evaluate_circuit
from mechkit.circuits.faithfulness import FaithfulnessCurve as FaithfulnessCurve
from mechkit.circuits.faithfulness import faithfulness_curve as faithfulness_curve
from mechkit.circuits.find_circuit import FoundCircuit as FoundCircuit
from mechkit.circuits.find_circuit import find_circuit as find_circuit
from mechkit.circuits.graph import Edge as Edge
from mechkit.circuits.graph import Graph as Graph
from mechkit.circuits.graph import Reader as Reader
from mechkit.circuits.graph import Writer as Writer
from mechkit.circuits.learned_masks import LearnedMask as LearnedMask
from mechkit.circuits.learned_masks import learn_mask as learn_mask
from mechkit.circuits.optimal_ablation import optimal_ablation as optimal_ablation
from mechkit.circuits.path_patching import path_patching as path_patching
