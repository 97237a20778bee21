# Terms left out one at a time, contrasts of random terms, conditional modes, predictions, influence: lme4 and lmerTest.
# Run in the repository's root: Rscript tests/oracle/left_out.R. Writes tests/oracle/left_out.json.
suppressMessages({library(lme4); library(lmerTest); library(pbkrtest); library(jsonlite)})
options(digits = 15)
tight <- lmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 1e5, rhoend = 1e-10), calc.derivs = FALSE)
bundled <- function(name, factors = character()) {
  data <- read.csv(file.path("mixjax/datasets", paste0(name, ".csv")), stringsAsFactors = TRUE)
  for (f in factors) data[[f]] <- factor(data[[f]])
  data
}
tables <- list(
  sleepstudy = bundled("sleepstudy", "Subject"), Dyestuff = bundled("Dyestuff"), Pastes = bundled("Pastes"),
  Penicillin = bundled("Penicillin"), Machines = bundled("Machines", "Worker"),
  cake = bundled("cake", c("replicate", "temperature")),
  crossed_factorial = read.csv("tests/data/crossed_factorial.csv", stringsAsFactors = TRUE)
)
fit <- function(data, formula, REML = TRUE, ...) {
  form <- as.formula(formula)
  d <- tables[[data]]
  eval(bquote(lmerTest::lmer(.(form), d, REML = .(REML), control = tight, ...)))
}
quiet <- function(x) suppressMessages(suppressWarnings(x))
columns <- function(table) c(list(row = I(rownames(table))), lapply(as.list(table), function(x) I(as.numeric(x))))

# --- ranova --------------------------------------------------------------------------------------------------------
random_models <- list(
  c("sleepstudy", "Reaction ~ Days + (Days | Subject)"),
  c("sleepstudy", "Reaction ~ Days + (Days || Subject)"),
  c("sleepstudy", "Reaction ~ Days + (1 | Subject)"),
  c("Dyestuff", "Yield ~ 1 + (1 | Batch)"),
  c("Pastes", "strength ~ 1 + (1 | batch/cask)"),
  c("Penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)"),
  c("Machines", "score ~ Machine + (Machine | Worker)"),
  c("Machines", "score ~ Machine + (0 + Machine | Worker)"),
  c("crossed_factorial", "y ~ a * b + x + (a + x | subj) + (1 | item)"),
  c("crossed_factorial", "y ~ a * b + (1 + a * b || subj) + (1 + a * b || item)"),
  c("crossed_factorial", "y ~ a * b + (a * b | subj) + (1 | item)"),
  c("crossed_factorial", "y ~ A + (0 + A + x | subj)"),
  c("crossed_factorial", "y ~ A + (A + x || subj)")
)
ranovas <- list()
for (model in random_models) for (REML in c(TRUE, FALSE)) for (reduce in c(TRUE, FALSE)) {
  m <- quiet(fit(model[1], model[2], REML))
  d <- tables[[model[1]]]
  ranovas[[length(ranovas) + 1]] <- list(data = model[1], formula = model[2], REML = REML, reduce = reduce,
    table = columns(quiet(ranova(m, reduce.terms = reduce))))
}

# --- drop1 ---------------------------------------------------------------------------------------------------------
fixed_models <- list(
  c("cake", "angle ~ recipe + temperature + (1 | recipe:replicate)"),
  c("cake", "angle ~ recipe * temperature + (1 | recipe:replicate)"),
  c("sleepstudy", "Reaction ~ Days + (Days | Subject)"),
  c("crossed_factorial", "y ~ A * B + x + (x | subj) + (1 | item)"),
  c("crossed_factorial", "y ~ 0 + A + B + x + (1 | subj) + (1 | item)"),
  c("crossed_factorial", "y ~ A * B * C + x + (1 | subj)")
)
drops <- list()
for (model in fixed_models) for (REML in c(TRUE, FALSE)) {
  m <- quiet(fit(model[1], model[2], REML))
  d <- tables[[model[1]]]
  plain <- quiet(lme4::lmer(as.formula(model[2]), d, REML = REML, control = tight))
  drops[[length(drops) + 1]] <- list(data = model[1], formula = model[2], REML = REML,
    satterthwaite = columns(quiet(drop1(m))),
    kenward_roger = if (REML) columns(quiet(drop1(m, ddf = "Kenward-Roger"))),
    chisq = columns(quiet(drop1(plain, test = "Chisq"))))
}

# --- contrasts that are attached to the column reach random terms -----------------------------------------------------
codings <- list()
for (coding in c("contr.treatment", "contr.sum", "contr.helmert", "contr.SAS"))
  for (model in list(c("Machines", "score ~ Machine + (Machine | Worker)", "Machine"),
                     c("crossed_factorial", "y ~ A * B + (A | subj)", "A"))) {
    d <- tables[[model[1]]]
    contrasts(d[[model[3]]]) <- get(coding)(nlevels(d[[model[3]]]))
    m <- quiet(lme4::lmer(as.formula(model[2]), d, control = tight))
    codings[[length(codings) + 1]] <- list(data = model[1], formula = model[2], factor = model[3], coding = coding,
      theta = unname(getME(m, "theta")), fixef = unname(fixef(m)), criterion = unname(REMLcrit(m)),
      sdcor = as.data.frame(VarCorr(m))$sdcor, ranef = as.matrix(ranef(m)[[1]]))
  }

# --- conditional modes as a tidy table -----------------------------------------------------------------------------------
modes <- list()
for (model in list(c("sleepstudy", "Reaction ~ Days + (Days | Subject)"),
                   c("sleepstudy", "Reaction ~ Days + (Days || Subject)"),
                   c("Pastes", "strength ~ 1 + (1 | batch/cask)"),
                   c("crossed_factorial", "y ~ a * b + x + (a + x | subj) + (1 | item)"))) {
  m <- quiet(fit(model[1], model[2]))
  f <- as.data.frame(ranef(m, condVar = TRUE))
  modes[[length(modes) + 1]] <- list(data = model[1], formula = model[2], grpvar = as.character(f$grpvar),
    term = as.character(f$term), grp = as.character(f$grp), condval = f$condval, condsd = f$condsd)
}

# --- predictions by parts of the random effects, and of rows without a level ------------------------------------------------
m <- quiet(fit("crossed_factorial", "y ~ a * b + x + (a + x | subj) + (1 | item)"))
d <- tables$crossed_factorial
parts <- list("~ (1 | subj)", "~ (0 + x | subj)", "~ (1 + x | subj)", "~ (1 | subj) + (1 | item)", "~ (a + x | subj)",
              "~ (1 | item)")
predictions <- lapply(parts, function(p) list(parts = p, fitted = unname(predict(m, re.form = as.formula(p)))))
new <- data.frame(a = c(0, 0.5, -0.5, 0), b = 0.5, x = c(1, -1, 0.25, 2), subj = factor(c("s03", NA, "nobody", NA)),
                  item = factor(c("i2", "i3", NA, NA)))
refused <- tryCatch({predict(m, new); ""}, error = function(e) conditionMessage(e))
unknown <- list(fitted = unname(predict(m, new, allow.new.levels = TRUE)), refused = refused,
                population = unname(predict(m, new, re.form = NA)))

# --- influence --------------------------------------------------------------------------------------------------------
influences <- list()
for (model in list(c("sleepstudy", "Reaction ~ Days + (Days | Subject)", "Subject"),
                   c("Machines", "score ~ Machine + (1 | Worker)", "Worker"))) {
  d <- tables[[model[1]]]
  m <- quiet(lme4::lmer(as.formula(model[2]), d, control = tight))
  i <- quiet(influence(m, groups = model[3]))
  influences[[length(influences) + 1]] <- list(data = model[1], formula = model[2], by = model[3],
    units = rownames(i[[2]]), cooks = as.numeric(cooks.distance(i)), dfbetas = unname(as.matrix(dfbetas(i))),
    row_cooks = unname(cooks.distance(m)), hat = unname(hatvalues(m)), rstudent = unname(rstudent(m)))
}
w <- tables$crossed_factorial
m <- quiet(lme4::lmer(y ~ a * b + x + (x | subj) + (1 | item), w, weights = w, control = tight))
weighted <- list(data = "crossed_factorial", formula = "y ~ a * b + x + (x | subj) + (1 | item)", weights = "w",
                 row_cooks = unname(cooks.distance(m)), hat = unname(hatvalues(m)))

versions <- sapply(c("lme4", "lmerTest", "pbkrtest", "Matrix"), function(p) as.character(packageVersion(p)))
write_json(list(versions = c(as.list(versions), R = paste(R.version$major, R.version$minor, sep = ".")),
  ranova = ranovas, drop1 = drops, contrasts = codings, ranef = modes, predict = list(data = "crossed_factorial",
  formula = "y ~ a * b + x + (a + x | subj) + (1 | item)", parts = predictions, new = new, unknown = unknown),
  influence = influences, weighted = weighted),
  "tests/oracle/left_out.json", digits = 15, auto_unbox = TRUE, na = "null", matrix = "rowmajor", null = "null")
