"""What the pretraining was for: conversion to Detectron2, fine-tuning there, and tables of the results."""
