"""The charts of the page, and the figures behind them: curves, health, cost, agents, differences.

``uPlot.iife.min.js`` and ``uPlot.min.css`` are uPlot 1.6.32 as published on npm, with its licence.
"""
