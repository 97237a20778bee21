# The binomial analysis of docs/analyses.md in R: glmmTMB (Laplace), lme4 (quadrature), emmeans, and population means by
# integrate(). Run in the repository's root: Rscript tests/oracle/analyses_binomial.R.
# Writes tests/oracle/analyses_binomial.json.
suppressMessages({library(lme4); library(glmmTMB); library(emmeans); library(jsonlite)})
data("cbpp", package = "lme4")
cbpp$occasion <- factor(seq_len(nrow(cbpp)))
control <- glmmTMBControl(optCtrl = list(iter.max = 1e4, eval.max = 1e4, rel.tol = 1e-15, x.tol = 0))
herds <- glmmTMB(cbind(incidence, size - incidence) ~ period + (1 | herd), cbpp, binomial, control = control)
both <- update(herds, . ~ . + (1 | occasion))
exact <- glmer(cbind(incidence, size - incidence) ~ period + (1 | herd), cbpp, binomial, nAGQ = 10,
               control = glmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9)))
test <- anova(herds, both)
means <- emmeans(both, ~period, df = Inf)
set.seed(1)
pairs <- as.data.frame(summary(contrast(means, "trt.vs.ctrl", adjust = "mvt"), infer = TRUE, type = "response"))
eta <- as.data.frame(means)$emmean
sd <- sqrt(sum(unlist(VarCorr(both)$cond)))
average <- sapply(eta, function(e) integrate(function(z) plogis(e + sd * z) * dnorm(z), -Inf, Inf, rel.tol = 1e-10)$value)
period <- anova(update(both, . ~ . - period), both)
found <- list(
  herds = list(m2logLik = -2 * as.numeric(logLik(herds)), sd = sqrt(unlist(VarCorr(herds)$cond))[[1]]),
  quadrature = list(fixef = unname(fixef(exact)), sd = sqrt(unlist(VarCorr(exact)))[[1]]),
  both = list(m2logLik = -2 * as.numeric(logLik(both)), sd = unname(sqrt(unlist(VarCorr(both)$cond))),
              sd_names = names(VarCorr(both)$cond), fixef = unname(fixef(both)$cond),
              se = unname(sqrt(diag(vcov(both)$cond)))),
  test = list(chisq = test$Chisq[2], p = test[["Pr(>Chisq)"]][2]),
  period = list(chisq = period$Chisq[2], p = period[["Pr(>Chisq)"]][2]),
  ratios = list(contrast = as.character(pairs$contrast), odds_ratio = pairs$odds.ratio, std_error = pairs$SE,
                lower = pairs$asymp.LCL, upper = pairs$asymp.UCL, statistic = pairs$z.ratio, p_value = pairs$p.value),
  means = list(median = plogis(eta), average = average),
  average_ratios = (average[-1] / (1 - average[-1])) / (average[1] / (1 - average[1]))
)
versions <- sapply(c("lme4", "glmmTMB", "emmeans"), function(p) as.character(packageVersion(p)))
write(toJSON(c(found, list(versions = as.list(versions))), digits = 12, auto_unbox = TRUE, pretty = TRUE),
      "tests/oracle/analyses_binomial.json")
