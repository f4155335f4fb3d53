"""Estimators of how much attention a page gets, behind one protocol (`protocol.Estimator`)."""
