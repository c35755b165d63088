BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('dc11669786a5');
CREATE TABLE "assessments" (
	assessment_id VARCHAR(50) NOT NULL, 
	trace_id VARCHAR(50) NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	assessment_type VARCHAR(20) NOT NULL, 
	value TEXT NOT NULL, 
	error TEXT, 
	created_timestamp BIGINT NOT NULL, 
	last_updated_timestamp BIGINT NOT NULL, 
	source_type VARCHAR(50) NOT NULL, 
	source_id VARCHAR(250), 
	run_id VARCHAR(32), 
	span_id VARCHAR(50), 
	rationale TEXT, 
	overrides VARCHAR(50), 
	valid BOOLEAN NOT NULL, 
	assessment_metadata TEXT, 
	experiment_id INTEGER, 
	trace_timestamp_ms BIGINT, 
	aggregate_value FLOAT, 
	is_numeric_value BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT assessments_pk PRIMARY KEY (assessment_id), 
	CONSTRAINT fk_assessments_trace_id FOREIGN KEY(trace_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE budget_policies (
	budget_policy_id VARCHAR(36) NOT NULL, 
	budget_unit VARCHAR(32) NOT NULL, 
	budget_amount FLOAT NOT NULL, 
	duration_unit VARCHAR(32) NOT NULL, 
	duration_value INTEGER NOT NULL, 
	target_scope VARCHAR(32) NOT NULL, 
	budget_action VARCHAR(32) NOT NULL, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, target_value VARCHAR(255), 
	CONSTRAINT budget_policies_pk PRIMARY KEY (budget_policy_id)
);
CREATE TABLE "datasets" (
	dataset_uuid VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(500) NOT NULL, 
	digest VARCHAR(36) NOT NULL, 
	dataset_source_type VARCHAR(36) NOT NULL, 
	dataset_source TEXT NOT NULL, 
	dataset_schema TEXT, 
	dataset_profile TEXT, 
	CONSTRAINT dataset_pk PRIMARY KEY (experiment_id, name, digest), 
	CONSTRAINT fk_datasets_experiment_id_experiments FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
CREATE TABLE endpoint_bindings (
	endpoint_id VARCHAR(36) NOT NULL, 
	resource_type VARCHAR(50) NOT NULL, 
	resource_id VARCHAR(255) NOT NULL, 
	created_at BIGINT NOT NULL, 
	created_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), display_name VARCHAR(255), 
	CONSTRAINT endpoint_bindings_pk PRIMARY KEY (endpoint_id, resource_type, resource_id), 
	CONSTRAINT fk_endpoint_bindings_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE
);
CREATE TABLE endpoint_model_mappings (
	mapping_id VARCHAR(36) NOT NULL, 
	endpoint_id VARCHAR(36) NOT NULL, 
	model_definition_id VARCHAR(36) NOT NULL, 
	weight FLOAT NOT NULL, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, linkage_type VARCHAR(64) DEFAULT 'PRIMARY' NOT NULL, fallback_order INTEGER, 
	CONSTRAINT endpoint_model_mappings_pk PRIMARY KEY (mapping_id), 
	CONSTRAINT fk_endpoint_model_mappings_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE, 
	CONSTRAINT fk_endpoint_model_mappings_model_definition_id FOREIGN KEY(model_definition_id) REFERENCES model_definitions (model_definition_id)
);
CREATE TABLE endpoint_tags (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	endpoint_id VARCHAR(36) NOT NULL, 
	CONSTRAINT endpoint_tag_pk PRIMARY KEY ("key", endpoint_id), 
	CONSTRAINT fk_endpoint_tags_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE
);
CREATE TABLE "endpoints" (
	endpoint_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255), 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	routing_strategy VARCHAR(64), 
	fallback_config_json TEXT, 
	experiment_id INTEGER, 
	usage_tracking BOOLEAN DEFAULT '0' NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT endpoints_pk PRIMARY KEY (endpoint_id), 
	CONSTRAINT fk_endpoints_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE SET NULL, 
	CONSTRAINT uq_endpoints_workspace_name UNIQUE (workspace, name)
);
CREATE TABLE entity_associations (
	association_id VARCHAR(36) NOT NULL, 
	source_type VARCHAR(36) NOT NULL, 
	source_id VARCHAR(36) NOT NULL, 
	destination_type VARCHAR(36) NOT NULL, 
	destination_id VARCHAR(36) NOT NULL, 
	created_time BIGINT, 
	CONSTRAINT entity_associations_pk PRIMARY KEY (source_type, source_id, destination_type, destination_id)
);
CREATE TABLE "evaluation_dataset_records" (
	dataset_record_id VARCHAR(36) NOT NULL, 
	dataset_id VARCHAR(36) NOT NULL, 
	inputs JSON NOT NULL, 
	expectations JSON, 
	tags JSON, 
	source JSON, 
	source_id VARCHAR(36), 
	source_type VARCHAR(255), 
	created_time BIGINT, 
	last_update_time BIGINT, 
	created_by VARCHAR(255), 
	last_updated_by VARCHAR(255), 
	input_hash VARCHAR(64) NOT NULL, outputs JSON, 
	CONSTRAINT evaluation_dataset_records_pk PRIMARY KEY (dataset_record_id), 
	CONSTRAINT fk_evaluation_dataset_records_dataset_id FOREIGN KEY(dataset_id) REFERENCES evaluation_datasets (dataset_id) ON DELETE CASCADE, 
	CONSTRAINT unique_dataset_input UNIQUE (dataset_id, input_hash)
);
CREATE TABLE evaluation_dataset_tags (
	dataset_id VARCHAR(36) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	value VARCHAR(5000), 
	CONSTRAINT evaluation_dataset_tags_pk PRIMARY KEY (dataset_id, "key"), 
	CONSTRAINT fk_evaluation_dataset_tags_dataset_id FOREIGN KEY(dataset_id) REFERENCES evaluation_datasets (dataset_id) ON DELETE CASCADE
);
CREATE TABLE "evaluation_datasets" (
	dataset_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	schema TEXT, 
	profile TEXT, 
	digest VARCHAR(64), 
	created_time BIGINT, 
	last_update_time BIGINT, 
	created_by VARCHAR(255), 
	last_updated_by VARCHAR(255), 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT evaluation_datasets_pk PRIMARY KEY (dataset_id)
);
CREATE TABLE "experiment_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value TEXT, 
	experiment_id INTEGER NOT NULL, 
	CONSTRAINT experiment_tag_pk PRIMARY KEY ("key", experiment_id), 
	FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id)
);
CREATE TABLE "experiments" (
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	artifact_location VARCHAR(256), 
	lifecycle_stage VARCHAR(32), 
	creation_time BIGINT, 
	last_update_time BIGINT, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT experiment_pk PRIMARY KEY (experiment_id), 
	CONSTRAINT experiments_lifecycle_stage CHECK (lifecycle_stage IN ('active', 'deleted')), 
	CONSTRAINT uq_experiments_workspace_name UNIQUE (workspace, name)
);
INSERT INTO "experiments" VALUES(0,'Default','/opt/checkout/mlruns/0','active',1796002337825,1796002337825,'default');
INSERT INTO "experiments" VALUES(1,'register','@ROOT@/mlflow','active',1796002374770,1796002374770,'default');
INSERT INTO "experiments" VALUES(2,'train-generator','@ROOT@/mlflow','active',1796002379133,1796002379133,'default');
INSERT INTO "experiments" VALUES(3,'evaluate-generator','@ROOT@/mlflow','active',1796002458833,1796002458833,'default');
CREATE TABLE guardrail_configs (
	endpoint_id VARCHAR(36) NOT NULL, 
	guardrail_id VARCHAR(36) NOT NULL, 
	execution_order INTEGER, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT guardrail_configs_pk PRIMARY KEY (endpoint_id, guardrail_id), 
	CONSTRAINT fk_guardrail_configs_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE, 
	CONSTRAINT fk_guardrail_configs_guardrail_id FOREIGN KEY(guardrail_id) REFERENCES guardrails (guardrail_id) ON DELETE CASCADE
);
CREATE TABLE guardrails (
	guardrail_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	scorer_id VARCHAR(36) NOT NULL, 
	scorer_version INTEGER NOT NULL, 
	stage VARCHAR(32) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	action_endpoint_id VARCHAR(36), 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT guardrails_pk PRIMARY KEY (guardrail_id), 
	CONSTRAINT fk_guardrails_scorer_version FOREIGN KEY(scorer_id, scorer_version) REFERENCES scorer_versions (scorer_id, scorer_version), 
	CONSTRAINT fk_guardrails_action_endpoint_id FOREIGN KEY(action_endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE SET NULL
);
CREATE TABLE input_tags (
	input_uuid VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	value VARCHAR(500) NOT NULL, 
	CONSTRAINT input_tags_pk PRIMARY KEY (input_uuid, name)
);
CREATE TABLE inputs (
	input_uuid VARCHAR(36) NOT NULL, 
	source_type VARCHAR(36) NOT NULL, 
	source_id VARCHAR(36) NOT NULL, 
	destination_type VARCHAR(36) NOT NULL, 
	destination_id VARCHAR(36) NOT NULL, step BIGINT DEFAULT '0' NOT NULL, 
	CONSTRAINT inputs_pk PRIMARY KEY (source_type, source_id, destination_type, destination_id)
);
INSERT INTO "inputs" VALUES('00013e673d5c4b2ea87ac292d481730d','RUN_OUTPUT','0963e74458524eeb83417a9df315af9a','MODEL_OUTPUT','m-d60dc646e1474d62ad773e5b2e6cb75a',0);
INSERT INTO "inputs" VALUES('44f41bfa45504be3bfd6d861de921bae','RUN_OUTPUT','eb163d614d5443f1860d08b9f081751b','MODEL_OUTPUT','m-64f9f2d6ed3c4f48809feffaf201bf6a',0);
INSERT INTO "inputs" VALUES('138b8117a46f428188e98b317ee5cb03','RUN_OUTPUT','a4a175bd73dc4f0ea9b9f425089c01cd','MODEL_OUTPUT','m-682e17fd763f4c78b1aec0507510a62c',0);
INSERT INTO "inputs" VALUES('d853546ed3db4926b53fc9b4ae0edc48','RUN_OUTPUT','872d04c3883f4cd6b7bc799382fa970b','MODEL_OUTPUT','m-979aca0d64f54c3f92af41f3bd7c8124',0);
INSERT INTO "inputs" VALUES('1f2e9c52c55444de8e6437459482dce8','RUN_OUTPUT','04913718d0e64df4a460c060036d9221','MODEL_OUTPUT','m-4d4f8ebab13b4ca8bfd9533a994bb62e',0);
CREATE TABLE issues (
	issue_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	description TEXT NOT NULL, 
	status VARCHAR(50) NOT NULL, 
	severity VARCHAR(50), 
	root_causes TEXT, 
	source_run_id VARCHAR(32), 
	categories TEXT, 
	created_timestamp BIGINT NOT NULL, 
	last_updated_timestamp BIGINT NOT NULL, 
	created_by VARCHAR(255), 
	CONSTRAINT issues_pk PRIMARY KEY (issue_id), 
	CONSTRAINT fk_issues_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE, 
	CONSTRAINT fk_issues_source_run_id FOREIGN KEY(source_run_id) REFERENCES runs (run_uuid) ON DELETE SET NULL
);
CREATE TABLE job_locks (
	lock_key VARCHAR(255) NOT NULL, 
	job_id VARCHAR(36) NOT NULL, 
	acquired_at BIGINT NOT NULL, 
	CONSTRAINT job_locks_pk PRIMARY KEY (lock_key), 
	CONSTRAINT fk_job_locks_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE TABLE "jobs" (
	id VARCHAR(36) NOT NULL, 
	creation_time BIGINT NOT NULL, 
	job_name VARCHAR(500) NOT NULL, 
	params TEXT NOT NULL, 
	timeout FLOAT, 
	status INTEGER NOT NULL, 
	result TEXT, 
	retry_count INTEGER NOT NULL, 
	last_update_time BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, status_details JSON, creator VARCHAR(255), executor_backend VARCHAR(255), lease_expires_at BIGINT, status_message TEXT, progress JSON, progress_updated_at BIGINT, token_hash VARCHAR(64), scoped_permissions JSON, next_attempt_at BIGINT, 
	CONSTRAINT jobs_pk PRIMARY KEY (id)
);
CREATE TABLE label_schemas (
	schema_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	type VARCHAR(16) NOT NULL, 
	instruction TEXT, 
	enable_comment BOOLEAN DEFAULT '0' NOT NULL, 
	input_type VARCHAR(32) NOT NULL, 
	input_config TEXT NOT NULL, 
	created_by VARCHAR(255), 
	created_time BIGINT NOT NULL, 
	last_update_time BIGINT NOT NULL, 
	is_default BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT label_schemas_pk PRIMARY KEY (schema_id), 
	CONSTRAINT fk_label_schemas_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE, 
	CONSTRAINT uq_label_schemas_exp_name UNIQUE (experiment_id, name)
);
CREATE TABLE "latest_metrics" (
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT NOT NULL, 
	timestamp BIGINT, 
	step BIGINT NOT NULL, 
	is_nan BOOLEAN NOT NULL, 
	run_uuid VARCHAR(32) NOT NULL, 
	CONSTRAINT latest_metric_pk PRIMARY KEY ("key", run_uuid), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid), 
	CHECK (is_nan IN (0, 1))
);
INSERT INTO "latest_metrics" VALUES('loss',1.75711226463317871093e+00,1796002431253,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('learning_rate',1.71897087208408501672e-04,1796002431287,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('images_per_s',9.69164799543422184058e+00,1796002431296,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('model_flops_utilisation',3.36045320185894330535e-05,1796002431313,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('clip_score_knn',9.00931904972957775523e-02,1796002453391,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('clip_score_knn_high',1.32764638825811714939e-01,1796002453408,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('clip_score_knn_low',6.56194980149445439288e-02,1796002453418,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('clip_score_no_knn',0.0900594172885448,1796002453436,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('clip_score_no_knn_high',1.3297251549052691022e-01,1796002453452,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('clip_score_no_knn_low',6.55079725603905371755e-02,1796002453472,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_knn',0.0,1796002453492,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_knn_high',0.0,1796002453512,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_knn_low',0.0,1796002453529,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_no_knn',0.0,1796002453552,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_no_knn_high',0.0,1796002453565,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_no_knn_low',0.0,1796002453579,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('copy_rate_real',0.25,1796002453588,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('diversity_knn',1.49799485865940940065e-01,1796002453605,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_knn',1.65779513091267,1796002453628,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_knn_high',1.72472993316575617939e+00,1796002453644,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_knn_low',1.58173912931669402581e+00,1796002453662,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_no_knn',1.65784019494315693066e+00,1796002453676,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_no_knn_high',1.72473757711472419629e+00,1796002453698,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_no_knn_low',1.58201656464337414575e+00,1796002453716,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('fd_real_split',1.11306151250984108891e+00,1796002453733,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_knn',1.18688982527277833158e+01,1796002453748,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_knn_high',1.23669842914621384009e+01,1796002453768,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_knn_low',1.12433105551710035288e+01,1796002453787,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_no_knn',1.18710148383549718431e+01,1796002453796,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_no_knn_high',1.23650771529082899031e+01,1796002453816,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_no_knn_low',1.12475259123461555075e+01,1796002453833,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('mmd_real_split',3.25783132332976332889e+00,1796002453848,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_knn',2.70453922450542449951e-01,1796002453866,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_knn_high',2.86352300457656361309e-01,1796002453880,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_knn_low',2.52158254012465443683e-01,1796002453891,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_no_knn',2.7040818333625793457e-01,1796002453908,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_no_knn_high',2.86160663701593875885e-01,1796002453924,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_no_knn_low',2.5216289777308703579e-01,1796002453935,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('nearest_real',0.652353048324585,1796002453954,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('precision_knn',0.0,1796002453974,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('precision_knn_high',0.0,1796002453992,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('precision_knn_low',0.0,1796002454001,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('precision_no_knn',0.0,1796002454024,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('precision_no_knn_high',0.0,1796002454042,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('precision_no_knn_low',0.0,1796002454064,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('recall_knn',0.0,1796002454083,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('recall_knn_high',0.0,1796002454104,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('recall_knn_low',0.0,1796002454124,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('recall_no_knn',0.0,1796002454141,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('recall_no_knn_high',0.0,1796002454157,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('recall_no_knn_low',0.0,1796002454200,32,0,'eb163d614d5443f1860d08b9f081751b');
INSERT INTO "latest_metrics" VALUES('plain/clip_score_knn',9.00931904972957775523e-02,1796002478763,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/clip_score_knn_high',1.32764638825811714939e-01,1796002478781,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/clip_score_knn_low',6.56194980149445439288e-02,1796002478800,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/clip_score_no_knn',0.0900594172885448,1796002478808,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/clip_score_no_knn_high',1.3297251549052691022e-01,1796002478832,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/clip_score_no_knn_low',6.55079725603905371755e-02,1796002478843,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_knn',0.0,1796002478863,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_knn_high',0.0,1796002478877,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_knn_low',0.0,1796002478888,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_no_knn',0.0,1796002478894,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_no_knn_high',0.0,1796002478909,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_no_knn_low',0.0,1796002478924,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/copy_rate_real',0.25,1796002478936,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/diversity_knn',1.49799485865940940065e-01,1796002478950,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_knn',1.65779513091267,1796002478961,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_knn_high',1.72472993316575617939e+00,1796002478972,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_knn_low',1.58173912931669402581e+00,1796002478977,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_no_knn',1.65784019494315693066e+00,1796002478988,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_no_knn_high',1.72473757711472419629e+00,1796002478995,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_no_knn_low',1.58201656464337414575e+00,1796002479005,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/fd_real_split',1.11306151250984108891e+00,1796002479012,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_knn',1.18688982527277833158e+01,1796002479019,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_knn_high',1.23669842914621384009e+01,1796002479026,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_knn_low',1.12433105551710035288e+01,1796002479033,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_no_knn',1.18710148383549718431e+01,1796002479055,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_no_knn_high',1.23650771529082899031e+01,1796002479067,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_no_knn_low',1.12475259123461555075e+01,1796002479075,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/mmd_real_split',3.25783132332976332889e+00,1796002479084,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_knn',2.70453922450542449951e-01,1796002479093,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_knn_high',2.86352300457656361309e-01,1796002479107,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_knn_low',2.52158254012465443683e-01,1796002479113,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_no_knn',2.7040818333625793457e-01,1796002479124,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_no_knn_high',2.86160663701593875885e-01,1796002479143,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_no_knn_low',2.5216289777308703579e-01,1796002479156,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/nearest_real',0.652353048324585,1796002479165,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/precision_knn',0.0,1796002479172,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/precision_knn_high',0.0,1796002479180,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/precision_knn_low',0.0,1796002479185,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/precision_no_knn',0.0,1796002479196,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/precision_no_knn_high',0.0,1796002479202,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/precision_no_knn_low',0.0,1796002479212,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/recall_knn',0.0,1796002479225,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/recall_knn_high',0.0,1796002479243,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/recall_knn_low',0.0,1796002479254,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/recall_no_knn',0.0,1796002479263,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/recall_no_knn_high',0.0,1796002479278,0,0,'bb04669dfa604f1ba0c0696115781552');
INSERT INTO "latest_metrics" VALUES('plain/recall_no_knn_low',0.0,1796002479285,0,0,'bb04669dfa604f1ba0c0696115781552');
CREATE TABLE logged_model_metrics (
	model_id VARCHAR(36) NOT NULL, 
	metric_name VARCHAR(500) NOT NULL, 
	metric_timestamp_ms BIGINT NOT NULL, 
	metric_step BIGINT NOT NULL, 
	metric_value FLOAT, 
	experiment_id INTEGER NOT NULL, 
	run_id VARCHAR(32) NOT NULL, 
	dataset_uuid VARCHAR(36), 
	dataset_name VARCHAR(500), 
	dataset_digest VARCHAR(36), 
	CONSTRAINT logged_model_metrics_pk PRIMARY KEY (model_id, metric_name, metric_timestamp_ms, metric_step, run_id), 
	CONSTRAINT fk_logged_model_metrics_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_logged_model_metrics_model_id FOREIGN KEY(model_id) REFERENCES logged_models (model_id) ON DELETE CASCADE, 
	CONSTRAINT fk_logged_model_metrics_run_id FOREIGN KEY(run_id) REFERENCES runs (run_uuid) ON DELETE CASCADE
);
CREATE TABLE logged_model_params (
	model_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	param_key VARCHAR(255) NOT NULL, 
	param_value TEXT NOT NULL, 
	CONSTRAINT logged_model_params_pk PRIMARY KEY (model_id, param_key), 
	CONSTRAINT fk_logged_model_params_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_logged_model_params_model_id FOREIGN KEY(model_id) REFERENCES logged_models (model_id) ON DELETE CASCADE
);
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'domain','plain');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'database','@ROOT@/plain/database/02264800d21d11cd');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'root','@ROOT@');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.kind','transformer');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.image_size','16');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.channels','3');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.patch_size','4');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.layers','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.heads','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.head_width','8');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.network.prediction','velocity');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.autoencoder','None');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.image_size','None');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.editing','False');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.smallest_area','0.06');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.largest_area','0.5');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.largest_aspect','2.5');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.second_region','0.4');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.ellipse','0.5');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.empty','0.1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.whole','0.2');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.feather_px','1.0');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.restoration.drop_reference','0.7');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.neighbours','2');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.pool','2');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.fewer_neighbours','0.1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.drop_all','0.1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.drop_query','0.15');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.drop_neighbours','0.1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.gap_probability','0.7');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.conditioning.gap_weight','0.9');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.images','32');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.batch_size','4');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.pieces','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.learning_rate','0.003');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.schedule','cosine');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.warmup_images','8');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.weight_decay','0.01');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.gradient_clip','1.0');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.ema_decay','0.995');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.compile','True');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.bfloat16_copy','True');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.sharding','ddp');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.checkpoint_images','32');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.log_images','16');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.grid_images','32');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.training.seed','0');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.workers','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.cpus_per_worker','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.use_gpu','False');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.window_bytes','2147483648');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.guidance_scale','None');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'train.start_from','None');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.prompts','(''a red circle'', ''a blue square'', ''a green circle'', ''an orange square'')');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.prompt_urls','()');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.samples','4');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.steps','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.guidance','None');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.seed','0');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.seeds','2');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.diversity_prompts','1');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.ablations','False');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.bootstrap','10');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.copy_percentile','95.0');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.near_duplicate','0.95');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.inception_weights','None');
INSERT INTO "logged_model_params" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'evaluate.use_gpu','False');
CREATE TABLE logged_model_tags (
	model_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	tag_key VARCHAR(255) NOT NULL, 
	tag_value TEXT NOT NULL, 
	CONSTRAINT logged_model_tags_pk PRIMARY KEY (model_id, tag_key), 
	CONSTRAINT fk_logged_model_tags_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_logged_model_tags_model_id FOREIGN KEY(model_id) REFERENCES logged_models (model_id) ON DELETE CASCADE
);
INSERT INTO "logged_model_tags" VALUES('m-d60dc646e1474d62ad773e5b2e6cb75a',1,'mlflow.source.name','tests/compatibility/make_root.py');
INSERT INTO "logged_model_tags" VALUES('m-d60dc646e1474d62ad773e5b2e6cb75a',1,'mlflow.source.type','LOCAL');
INSERT INTO "logged_model_tags" VALUES('m-d60dc646e1474d62ad773e5b2e6cb75a',1,'mlflow.source.git.commit','a7d5b729fc1f3db968ff454090ee64c963b357b9');
INSERT INTO "logged_model_tags" VALUES('m-d60dc646e1474d62ad773e5b2e6cb75a',1,'mlflow.source.git.branch','main');
INSERT INTO "logged_model_tags" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'mlflow.source.name','tests/compatibility/make_root.py');
INSERT INTO "logged_model_tags" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'mlflow.source.type','LOCAL');
INSERT INTO "logged_model_tags" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'mlflow.source.git.commit','a7d5b729fc1f3db968ff454090ee64c963b357b9');
INSERT INTO "logged_model_tags" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'mlflow.source.git.branch','main');
INSERT INTO "logged_model_tags" VALUES('m-682e17fd763f4c78b1aec0507510a62c',1,'mlflow.source.name','tests/compatibility/make_root.py');
INSERT INTO "logged_model_tags" VALUES('m-682e17fd763f4c78b1aec0507510a62c',1,'mlflow.source.type','LOCAL');
INSERT INTO "logged_model_tags" VALUES('m-682e17fd763f4c78b1aec0507510a62c',1,'mlflow.source.git.commit','a7d5b729fc1f3db968ff454090ee64c963b357b9');
INSERT INTO "logged_model_tags" VALUES('m-682e17fd763f4c78b1aec0507510a62c',1,'mlflow.source.git.branch','main');
INSERT INTO "logged_model_tags" VALUES('m-979aca0d64f54c3f92af41f3bd7c8124',1,'mlflow.source.name','tests/compatibility/make_root.py');
INSERT INTO "logged_model_tags" VALUES('m-979aca0d64f54c3f92af41f3bd7c8124',1,'mlflow.source.type','LOCAL');
INSERT INTO "logged_model_tags" VALUES('m-979aca0d64f54c3f92af41f3bd7c8124',1,'mlflow.source.git.commit','a7d5b729fc1f3db968ff454090ee64c963b357b9');
INSERT INTO "logged_model_tags" VALUES('m-979aca0d64f54c3f92af41f3bd7c8124',1,'mlflow.source.git.branch','main');
INSERT INTO "logged_model_tags" VALUES('m-4d4f8ebab13b4ca8bfd9533a994bb62e',1,'mlflow.source.name','tests/compatibility/make_root.py');
INSERT INTO "logged_model_tags" VALUES('m-4d4f8ebab13b4ca8bfd9533a994bb62e',1,'mlflow.source.type','LOCAL');
INSERT INTO "logged_model_tags" VALUES('m-4d4f8ebab13b4ca8bfd9533a994bb62e',1,'mlflow.source.git.commit','a7d5b729fc1f3db968ff454090ee64c963b357b9');
INSERT INTO "logged_model_tags" VALUES('m-4d4f8ebab13b4ca8bfd9533a994bb62e',1,'mlflow.source.git.branch','main');
CREATE TABLE logged_models (
	model_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(500) NOT NULL, 
	artifact_location VARCHAR(1000) NOT NULL, 
	creation_timestamp_ms BIGINT NOT NULL, 
	last_updated_timestamp_ms BIGINT NOT NULL, 
	status INTEGER NOT NULL, 
	lifecycle_stage VARCHAR(32), 
	model_type VARCHAR(500), 
	source_run_id VARCHAR(32), 
	status_message VARCHAR(1000), 
	CONSTRAINT logged_models_pk PRIMARY KEY (model_id), 
	CONSTRAINT logged_models_lifecycle_stage_check CHECK (lifecycle_stage IN ('active', 'deleted')), 
	CONSTRAINT fk_logged_models_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
INSERT INTO "logged_models" VALUES('m-d60dc646e1474d62ad773e5b2e6cb75a',1,'knn-database-plain','@ROOT@/mlflow/models/m-d60dc646e1474d62ad773e5b2e6cb75a/artifacts',1796002375177,1796002377643,2,'active',NULL,'0963e74458524eeb83417a9df315af9a',NULL);
INSERT INTO "logged_models" VALUES('m-64f9f2d6ed3c4f48809feffaf201bf6a',2,'knn-diffusion','@ROOT@/mlflow/models/m-64f9f2d6ed3c4f48809feffaf201bf6a/artifacts',1796002454264,1796002454422,2,'active',NULL,'eb163d614d5443f1860d08b9f081751b',NULL);
INSERT INTO "logged_models" VALUES('m-682e17fd763f4c78b1aec0507510a62c',1,'knn-database-shapes','@ROOT@/mlflow/models/m-682e17fd763f4c78b1aec0507510a62c/artifacts',1796002511492,1796002511599,2,'active',NULL,'a4a175bd73dc4f0ea9b9f425089c01cd',NULL);
INSERT INTO "logged_models" VALUES('m-979aca0d64f54c3f92af41f3bd7c8124',1,'knn-database-shapes','@ROOT@/mlflow/models/m-979aca0d64f54c3f92af41f3bd7c8124/artifacts',1796002567046,1796002567201,2,'active',NULL,'872d04c3883f4cd6b7bc799382fa970b',NULL);
INSERT INTO "logged_models" VALUES('m-4d4f8ebab13b4ca8bfd9533a994bb62e',1,'knn-database-shapes','@ROOT@/mlflow/models/m-4d4f8ebab13b4ca8bfd9533a994bb62e/artifacts',1796002589443,1796002589549,2,'active',NULL,'04913718d0e64df4a460c060036d9221',NULL);
CREATE TABLE mcp_access_endpoints (
	id VARCHAR(36) NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	server_name VARCHAR(256) NOT NULL, 
	server_version VARCHAR(128), 
	server_alias VARCHAR(256), 
	url VARCHAR(2048) NOT NULL, 
	transport_type VARCHAR(32) DEFAULT 'streamable-http' NOT NULL, 
	created_by VARCHAR(256), 
	last_updated_by VARCHAR(256), 
	created_at BIGINT NOT NULL, 
	last_updated_at BIGINT NOT NULL, 
	CONSTRAINT mcp_access_endpoints_pk PRIMARY KEY (id), 
	CONSTRAINT mcp_access_endpoints_server_fkey FOREIGN KEY(workspace, server_name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_aliases (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	alias VARCHAR(256) NOT NULL, 
	version VARCHAR(128) NOT NULL, 
	CONSTRAINT mcp_server_aliases_pk PRIMARY KEY (workspace, name, alias), 
	CONSTRAINT mcp_server_aliases_server_fkey FOREIGN KEY(workspace, name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_tags (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	CONSTRAINT mcp_server_tags_pk PRIMARY KEY (workspace, name, "key"), 
	CONSTRAINT mcp_server_tags_server_fkey FOREIGN KEY(workspace, name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_version_tags (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	version VARCHAR(128) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	CONSTRAINT mcp_server_version_tags_pk PRIMARY KEY (workspace, name, version, "key"), 
	CONSTRAINT mcp_server_version_tags_version_fkey FOREIGN KEY(workspace, name, version) REFERENCES mcp_server_versions (workspace, name, version) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_versions (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	version VARCHAR(128) NOT NULL, 
	version_major INTEGER NOT NULL, 
	version_minor INTEGER NOT NULL, 
	version_patch INTEGER NOT NULL, 
	version_prerelease_sort_key VARCHAR(512) NOT NULL, 
	server_json JSON NOT NULL, 
	status VARCHAR(20) DEFAULT 'draft' NOT NULL, 
	tools JSON, 
	source VARCHAR(512), 
	connect_options JSON, 
	created_by VARCHAR(256), 
	last_updated_by VARCHAR(256), 
	created_at BIGINT NOT NULL, 
	last_updated_at BIGINT NOT NULL, 
	CONSTRAINT mcp_server_versions_pk PRIMARY KEY (workspace, name, version), 
	CONSTRAINT mcp_server_versions_server_fkey FOREIGN KEY(workspace, name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_servers (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	display_name VARCHAR(256), 
	description TEXT, 
	icons JSON, 
	created_by VARCHAR(256), 
	last_updated_by VARCHAR(256), 
	created_at BIGINT NOT NULL, 
	last_updated_at BIGINT NOT NULL, 
	CONSTRAINT mcp_servers_pk PRIMARY KEY (workspace, name)
);
CREATE TABLE "metrics" (
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT NOT NULL, 
	timestamp BIGINT NOT NULL, 
	run_uuid VARCHAR(32) NOT NULL, 
	step BIGINT DEFAULT '0' NOT NULL, 
	is_nan BOOLEAN DEFAULT '0' NOT NULL, 
	CONSTRAINT metric_pk PRIMARY KEY ("key", timestamp, step, run_uuid, value, is_nan), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid), 
	CHECK (is_nan IN (0, 1))
);
INSERT INTO "metrics" VALUES('loss',1.85228264331817626953e+00,1796002431122,'eb163d614d5443f1860d08b9f081751b',16,0);
INSERT INTO "metrics" VALUES('learning_rate',2.09254464557668195742e-03,1796002431142,'eb163d614d5443f1860d08b9f081751b',16,0);
INSERT INTO "metrics" VALUES('images_per_s',3.16035461549562398894e+02,1796002431179,'eb163d614d5443f1860d08b9f081751b',16,0);
INSERT INTO "metrics" VALUES('model_flops_utilisation',1.09581196011815460572e-03,1796002431200,'eb163d614d5443f1860d08b9f081751b',16,0);
INSERT INTO "metrics" VALUES('loss',1.75711226463317871093e+00,1796002431253,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('learning_rate',1.71897087208408501672e-04,1796002431287,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('images_per_s',9.69164799543422184058e+00,1796002431296,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('model_flops_utilisation',3.36045320185894330535e-05,1796002431313,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('clip_score_knn',9.00931904972957775523e-02,1796002453391,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('clip_score_knn_high',1.32764638825811714939e-01,1796002453408,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('clip_score_knn_low',6.56194980149445439288e-02,1796002453418,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('clip_score_no_knn',0.0900594172885448,1796002453436,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('clip_score_no_knn_high',1.3297251549052691022e-01,1796002453452,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('clip_score_no_knn_low',6.55079725603905371755e-02,1796002453472,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_knn',0.0,1796002453492,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_knn_high',0.0,1796002453512,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_knn_low',0.0,1796002453529,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_no_knn',0.0,1796002453552,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_no_knn_high',0.0,1796002453565,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_no_knn_low',0.0,1796002453579,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('copy_rate_real',0.25,1796002453588,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('diversity_knn',1.49799485865940940065e-01,1796002453605,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_knn',1.65779513091267,1796002453628,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_knn_high',1.72472993316575617939e+00,1796002453644,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_knn_low',1.58173912931669402581e+00,1796002453662,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_no_knn',1.65784019494315693066e+00,1796002453676,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_no_knn_high',1.72473757711472419629e+00,1796002453698,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_no_knn_low',1.58201656464337414575e+00,1796002453716,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('fd_real_split',1.11306151250984108891e+00,1796002453733,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_knn',1.18688982527277833158e+01,1796002453748,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_knn_high',1.23669842914621384009e+01,1796002453768,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_knn_low',1.12433105551710035288e+01,1796002453787,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_no_knn',1.18710148383549718431e+01,1796002453796,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_no_knn_high',1.23650771529082899031e+01,1796002453816,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_no_knn_low',1.12475259123461555075e+01,1796002453833,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('mmd_real_split',3.25783132332976332889e+00,1796002453848,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_knn',2.70453922450542449951e-01,1796002453866,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_knn_high',2.86352300457656361309e-01,1796002453880,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_knn_low',2.52158254012465443683e-01,1796002453891,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_no_knn',2.7040818333625793457e-01,1796002453908,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_no_knn_high',2.86160663701593875885e-01,1796002453924,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_no_knn_low',2.5216289777308703579e-01,1796002453935,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('nearest_real',0.652353048324585,1796002453954,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('precision_knn',0.0,1796002453974,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('precision_knn_high',0.0,1796002453992,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('precision_knn_low',0.0,1796002454001,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('precision_no_knn',0.0,1796002454024,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('precision_no_knn_high',0.0,1796002454042,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('precision_no_knn_low',0.0,1796002454064,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('recall_knn',0.0,1796002454083,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('recall_knn_high',0.0,1796002454104,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('recall_knn_low',0.0,1796002454124,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('recall_no_knn',0.0,1796002454141,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('recall_no_knn_high',0.0,1796002454157,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('recall_no_knn_low',0.0,1796002454200,'eb163d614d5443f1860d08b9f081751b',32,0);
INSERT INTO "metrics" VALUES('plain/clip_score_knn',9.00931904972957775523e-02,1796002478763,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/clip_score_knn_high',1.32764638825811714939e-01,1796002478781,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/clip_score_knn_low',6.56194980149445439288e-02,1796002478800,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/clip_score_no_knn',0.0900594172885448,1796002478808,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/clip_score_no_knn_high',1.3297251549052691022e-01,1796002478832,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/clip_score_no_knn_low',6.55079725603905371755e-02,1796002478843,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_knn',0.0,1796002478863,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_knn_high',0.0,1796002478877,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_knn_low',0.0,1796002478888,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_no_knn',0.0,1796002478894,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_no_knn_high',0.0,1796002478909,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_no_knn_low',0.0,1796002478924,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/copy_rate_real',0.25,1796002478936,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/diversity_knn',1.49799485865940940065e-01,1796002478950,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_knn',1.65779513091267,1796002478961,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_knn_high',1.72472993316575617939e+00,1796002478972,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_knn_low',1.58173912931669402581e+00,1796002478977,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_no_knn',1.65784019494315693066e+00,1796002478988,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_no_knn_high',1.72473757711472419629e+00,1796002478995,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_no_knn_low',1.58201656464337414575e+00,1796002479005,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/fd_real_split',1.11306151250984108891e+00,1796002479012,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_knn',1.18688982527277833158e+01,1796002479019,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_knn_high',1.23669842914621384009e+01,1796002479026,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_knn_low',1.12433105551710035288e+01,1796002479033,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_no_knn',1.18710148383549718431e+01,1796002479055,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_no_knn_high',1.23650771529082899031e+01,1796002479067,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_no_knn_low',1.12475259123461555075e+01,1796002479075,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/mmd_real_split',3.25783132332976332889e+00,1796002479084,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_knn',2.70453922450542449951e-01,1796002479093,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_knn_high',2.86352300457656361309e-01,1796002479107,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_knn_low',2.52158254012465443683e-01,1796002479113,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_no_knn',2.7040818333625793457e-01,1796002479124,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_no_knn_high',2.86160663701593875885e-01,1796002479143,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_no_knn_low',2.5216289777308703579e-01,1796002479156,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/nearest_real',0.652353048324585,1796002479165,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/precision_knn',0.0,1796002479172,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/precision_knn_high',0.0,1796002479180,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/precision_knn_low',0.0,1796002479185,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/precision_no_knn',0.0,1796002479196,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/precision_no_knn_high',0.0,1796002479202,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/precision_no_knn_low',0.0,1796002479212,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/recall_knn',0.0,1796002479225,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/recall_knn_high',0.0,1796002479243,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/recall_knn_low',0.0,1796002479254,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/recall_no_knn',0.0,1796002479263,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/recall_no_knn_high',0.0,1796002479278,'bb04669dfa604f1ba0c0696115781552',0,0);
INSERT INTO "metrics" VALUES('plain/recall_no_knn_low',0.0,1796002479285,'bb04669dfa604f1ba0c0696115781552',0,0);
CREATE TABLE "model_definitions" (
	model_definition_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	secret_id VARCHAR(36), 
	provider VARCHAR(64) NOT NULL, 
	model_name VARCHAR(256) NOT NULL, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT model_definitions_pk PRIMARY KEY (model_definition_id), 
	CONSTRAINT fk_model_definitions_secret_id FOREIGN KEY(secret_id) REFERENCES secrets (secret_id) ON DELETE SET NULL, 
	CONSTRAINT uq_model_definitions_workspace_name UNIQUE (workspace, name)
);
CREATE TABLE "model_version_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value TEXT, 
	name VARCHAR(256) NOT NULL, 
	version INTEGER NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT model_version_tag_pk PRIMARY KEY (workspace, "key", name, version), 
	CONSTRAINT fk_model_version_tags_model_versions FOREIGN KEY(workspace, name, version) REFERENCES model_versions (workspace, name, version) ON UPDATE CASCADE
);
INSERT INTO "model_version_tags" VALUES('digest','6ea993cefbf915b468fad30319fe05b1a0efcc3c32d5ff8a8e44806fd248b022','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('uri','@ROOT@/plain/database/02264800d21d11cd','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('encoder','sticker-clip','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('rows','8','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('bytes','31699','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('index','Flat','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_image','1.0000','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_text','1.0000','knn-database.plain',1,'default');
INSERT INTO "model_version_tags" VALUES('digest','dfe580eeab36e54104c31abe1cc0a70400ab087fb7599eece8dbe3c909a9ad43','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('uri','@ROOT@/plain/generator/0d18a230c4e06b3c','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('encoder','sticker-clip','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('rows','8','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('images_seen','32','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('database','models:/knn-database.plain@champion','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('clip_score_knn','0.0901','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('clip_score_knn_high','0.1328','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('clip_score_knn_low','0.0656','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('clip_score_no_knn','0.0901','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('clip_score_no_knn_high','0.1330','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('clip_score_no_knn_low','0.0655','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_knn','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_knn_high','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_knn_low','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_no_knn','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_no_knn_high','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_no_knn_low','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('copy_rate_real','0.2500','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('diversity_knn','0.1498','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_knn','1.6578','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_knn_high','1.7247','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_knn_low','1.5817','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_no_knn','1.6578','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_no_knn_high','1.7247','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_no_knn_low','1.5820','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('fd_real_split','1.1131','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_knn','11.8689','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_knn_high','12.3670','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_knn_low','11.2433','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_no_knn','11.8710','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_no_knn_high','12.3651','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_no_knn_low','11.2475','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('mmd_real_split','3.2578','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_knn','0.2705','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_knn_high','0.2864','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_knn_low','0.2522','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_no_knn','0.2704','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_no_knn_high','0.2862','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_no_knn_low','0.2522','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('nearest_real','0.6524','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('precision_knn','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('precision_knn_high','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('precision_knn_low','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('precision_no_knn','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('precision_no_knn_high','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('precision_no_knn_low','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_knn','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_knn_high','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_knn_low','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_no_knn','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_no_knn_high','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_no_knn_low','0.0000','knn-diffusion',1,'default');
INSERT INTO "model_version_tags" VALUES('digest','6ea993cefbf915b468fad30319fe05b1a0efcc3c32d5ff8a8e44806fd248b022','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('uri','@ROOT@/shapes/database/02264800d21d11cd','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('encoder','sticker-clip','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('rows','8','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('bytes','31699','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('index','Flat','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_image','1.0000','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_text','1.0000','knn-database.shapes',1,'default');
INSERT INTO "model_version_tags" VALUES('digest','3909a3419bd954ca80180d850c3bd5344dea5108f50d3242fa579dbf81c92e01','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('uri','@ROOT@/shapes/database/c3b3d6f32448ab1a','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('encoder','sticker-clip','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('rows','12','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('bytes','40663','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('index','Flat','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_image','1.0000','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_text','1.0000','knn-database.shapes',2,'default');
INSERT INTO "model_version_tags" VALUES('digest','f88325c5e5aca2cd3a43fdba6af038e89b248962c65fb379346a9636139e32d7','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('uri','@ROOT@/shapes/database/bf703f89ac14c081','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('encoder','sticker-clip','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('rows','11','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('bytes','40679','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('index','Flat','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_image','1.0000','knn-database.shapes',3,'default');
INSERT INTO "model_version_tags" VALUES('recall_at_10_text','1.0000','knn-database.shapes',3,'default');
CREATE TABLE "model_versions" (
	name VARCHAR(256) NOT NULL, 
	version INTEGER NOT NULL, 
	creation_time BIGINT, 
	last_updated_time BIGINT, 
	description VARCHAR(5000), 
	user_id VARCHAR(256), 
	current_stage VARCHAR(20), 
	source VARCHAR(500), 
	run_id VARCHAR(32), 
	status VARCHAR(20), 
	status_message VARCHAR(500), 
	run_link VARCHAR(500), 
	storage_location VARCHAR(500), 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT model_version_pk PRIMARY KEY (workspace, name, version), 
	CONSTRAINT fk_model_versions_registered_models FOREIGN KEY(workspace, name) REFERENCES registered_models (workspace, name) ON UPDATE CASCADE
);
INSERT INTO "model_versions" VALUES('knn-database.plain',1,1796002377877,1796002377877,NULL,NULL,'None','models:/m-d60dc646e1474d62ad773e5b2e6cb75a','0963e74458524eeb83417a9df315af9a','READY',NULL,NULL,'@ROOT@/mlflow/models/m-d60dc646e1474d62ad773e5b2e6cb75a/artifacts','default');
INSERT INTO "model_versions" VALUES('knn-diffusion',1,1796002454457,1796002454457,NULL,NULL,'None','models:/m-64f9f2d6ed3c4f48809feffaf201bf6a','eb163d614d5443f1860d08b9f081751b','READY',NULL,NULL,'@ROOT@/mlflow/models/m-64f9f2d6ed3c4f48809feffaf201bf6a/artifacts','default');
INSERT INTO "model_versions" VALUES('knn-database.shapes',1,1796002511666,1796002511666,NULL,NULL,'None','models:/m-682e17fd763f4c78b1aec0507510a62c','a4a175bd73dc4f0ea9b9f425089c01cd','READY',NULL,NULL,'@ROOT@/mlflow/models/m-682e17fd763f4c78b1aec0507510a62c/artifacts','default');
INSERT INTO "model_versions" VALUES('knn-database.shapes',2,1796002567305,1796002567305,NULL,NULL,'None','models:/m-979aca0d64f54c3f92af41f3bd7c8124','872d04c3883f4cd6b7bc799382fa970b','READY',NULL,NULL,'@ROOT@/mlflow/models/m-979aca0d64f54c3f92af41f3bd7c8124/artifacts','default');
INSERT INTO "model_versions" VALUES('knn-database.shapes',3,1796002589591,1796002589591,NULL,NULL,'None','models:/m-4d4f8ebab13b4ca8bfd9533a994bb62e','04913718d0e64df4a460c060036d9221','READY',NULL,NULL,'@ROOT@/mlflow/models/m-4d4f8ebab13b4ca8bfd9533a994bb62e/artifacts','default');
CREATE TABLE online_scoring_configs (
	online_scoring_config_id VARCHAR(36) NOT NULL, 
	scorer_id VARCHAR(36) NOT NULL, 
	sample_rate FLOAT NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	filter_string TEXT, 
	CONSTRAINT online_scoring_config_pk PRIMARY KEY (online_scoring_config_id), 
	CONSTRAINT fk_online_scoring_configs_scorer_id FOREIGN KEY(scorer_id) REFERENCES scorers (scorer_id) ON DELETE CASCADE, 
	CONSTRAINT fk_online_scoring_configs_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id)
);
CREATE TABLE "params" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000) NOT NULL, 
	run_uuid VARCHAR(32) NOT NULL, 
	CONSTRAINT param_pk PRIMARY KEY ("key", run_uuid), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid)
);
INSERT INTO "params" VALUES('uri','@ROOT@/plain/database/02264800d21d11cd','0963e74458524eeb83417a9df315af9a');
INSERT INTO "params" VALUES('domain','plain','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('database','@ROOT@/plain/database/02264800d21d11cd','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('root','@ROOT@','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.kind','transformer','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.image_size','16','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.channels','3','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.patch_size','4','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.layers','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.heads','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.head_width','8','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.network.prediction','velocity','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.autoencoder','None','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.image_size','None','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.editing','False','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.smallest_area','0.06','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.largest_area','0.5','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.largest_aspect','2.5','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.second_region','0.4','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.ellipse','0.5','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.empty','0.1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.whole','0.2','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.feather_px','1.0','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.restoration.drop_reference','0.7','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.neighbours','2','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.pool','2','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.fewer_neighbours','0.1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.drop_all','0.1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.drop_query','0.15','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.drop_neighbours','0.1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.gap_probability','0.7','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.conditioning.gap_weight','0.9','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.images','32','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.batch_size','4','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.pieces','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.learning_rate','0.003','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.schedule','cosine','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.warmup_images','8','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.weight_decay','0.01','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.gradient_clip','1.0','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.ema_decay','0.995','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.compile','True','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.bfloat16_copy','True','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.sharding','ddp','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.checkpoint_images','32','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.log_images','16','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.grid_images','32','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.training.seed','0','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.workers','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.cpus_per_worker','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.use_gpu','False','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.window_bytes','2147483648','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.guidance_scale','None','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('train.start_from','None','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.prompts','(''a red circle'', ''a blue square'', ''a green circle'', ''an orange square'')','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.prompt_urls','()','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.samples','4','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.steps','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.guidance','None','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.seed','0','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.seeds','2','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.diversity_prompts','1','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.ablations','False','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.bootstrap','10','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.copy_percentile','95.0','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.near_duplicate','0.95','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.inception_weights','None','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('evaluate.use_gpu','False','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "params" VALUES('generator','knn-diffusion','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('databases','(''plain'',)','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('texts','None','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('root','@ROOT@','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.prompts','(''a red circle'', ''a blue square'', ''a green circle'', ''an orange square'')','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.prompt_urls','()','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.samples','4','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.steps','1','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.guidance','None','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.seed','0','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.seeds','2','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.diversity_prompts','1','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.ablations','True','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.bootstrap','10','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.copy_percentile','95.0','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.near_duplicate','0.95','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.inception_weights','None','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('evaluate.use_gpu','False','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "params" VALUES('uri','@ROOT@/shapes/database/02264800d21d11cd','a4a175bd73dc4f0ea9b9f425089c01cd');
INSERT INTO "params" VALUES('uri','@ROOT@/shapes/database/c3b3d6f32448ab1a','872d04c3883f4cd6b7bc799382fa970b');
INSERT INTO "params" VALUES('uri','@ROOT@/shapes/database/bf703f89ac14c081','04913718d0e64df4a460c060036d9221');
CREATE TABLE "registered_model_aliases" (
	alias VARCHAR(256) NOT NULL, 
	version INTEGER NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT registered_model_alias_pk PRIMARY KEY (workspace, name, alias), 
	CONSTRAINT fk_registered_model_aliases_registered_models FOREIGN KEY(workspace, name) REFERENCES registered_models (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
INSERT INTO "registered_model_aliases" VALUES('champion',1,'knn-database.plain','default');
INSERT INTO "registered_model_aliases" VALUES('champion',1,'knn-diffusion','default');
INSERT INTO "registered_model_aliases" VALUES('champion',3,'knn-database.shapes','default');
CREATE TABLE "registered_model_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	name VARCHAR(256) NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT registered_model_tag_pk PRIMARY KEY (workspace, "key", name), 
	CONSTRAINT fk_registered_model_tags_registered_models FOREIGN KEY(workspace, name) REFERENCES registered_models (workspace, name) ON UPDATE CASCADE
);
CREATE TABLE "registered_models" (
	name VARCHAR(256) NOT NULL, 
	creation_time BIGINT, 
	last_updated_time BIGINT, 
	description VARCHAR(5000), 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT registered_model_pk PRIMARY KEY (workspace, name)
);
INSERT INTO "registered_models" VALUES('knn-database.plain',1796002377825,1796002377877,NULL,'default');
INSERT INTO "registered_models" VALUES('knn-diffusion',1796002454445,1796002454457,NULL,'default');
INSERT INTO "registered_models" VALUES('knn-database.shapes',1796002511636,1796002589591,NULL,'default');
CREATE TABLE review_queue_items (
	queue_id VARCHAR(36) NOT NULL, 
	item_type VARCHAR(16) NOT NULL, 
	item_id VARCHAR(50) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	completed_by VARCHAR(250), 
	completed_time_ms BIGINT, 
	creation_time_ms BIGINT NOT NULL, 
	last_update_time_ms BIGINT NOT NULL, 
	CONSTRAINT review_queue_items_pk PRIMARY KEY (queue_id, item_id), 
	CONSTRAINT fk_review_queue_items_queue_id FOREIGN KEY(queue_id) REFERENCES review_queues (queue_id) ON DELETE CASCADE
);
CREATE TABLE review_queue_label_schemas (
	queue_id VARCHAR(36) NOT NULL, 
	schema_id VARCHAR(36) NOT NULL, 
	CONSTRAINT review_queue_label_schemas_pk PRIMARY KEY (queue_id, schema_id), 
	CONSTRAINT fk_review_queue_label_schemas_queue_id FOREIGN KEY(queue_id) REFERENCES review_queues (queue_id) ON DELETE CASCADE
);
CREATE TABLE review_queue_users (
	queue_id VARCHAR(36) NOT NULL, 
	user_id VARCHAR(250) NOT NULL, 
	CONSTRAINT review_queue_users_pk PRIMARY KEY (queue_id, user_id), 
	CONSTRAINT fk_review_queue_users_queue_id FOREIGN KEY(queue_id) REFERENCES review_queues (queue_id) ON DELETE CASCADE
);
CREATE TABLE review_queues (
	queue_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	queue_type VARCHAR(16) NOT NULL, 
	created_by VARCHAR(255), 
	creation_time_ms BIGINT NOT NULL, 
	last_update_time_ms BIGINT NOT NULL, 
	name_key VARCHAR(250) NOT NULL, 
	CONSTRAINT review_queues_pk PRIMARY KEY (queue_id), 
	CONSTRAINT fk_review_queues_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE, 
	CONSTRAINT uq_review_queues_experiment_name_key UNIQUE (experiment_id, name_key)
);
CREATE TABLE "runs" (
	run_uuid VARCHAR(32) NOT NULL, 
	name VARCHAR(250), 
	source_type VARCHAR(20), 
	source_name VARCHAR(500), 
	entry_point_name VARCHAR(50), 
	user_id VARCHAR(256), 
	status VARCHAR(9), 
	start_time BIGINT, 
	end_time BIGINT, 
	source_version VARCHAR(50), 
	lifecycle_stage VARCHAR(20), 
	artifact_uri VARCHAR(200), 
	experiment_id INTEGER, deleted_time BIGINT, 
	CONSTRAINT run_pk PRIMARY KEY (run_uuid), 
	CONSTRAINT source_type CHECK (source_type IN ('NOTEBOOK', 'JOB', 'LOCAL', 'UNKNOWN', 'PROJECT')), 
	CONSTRAINT runs_lifecycle_stage CHECK (lifecycle_stage IN ('active', 'deleted')), 
	FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CHECK (status IN ('SCHEDULED', 'FAILED', 'FINISHED', 'RUNNING', 'KILLED'))
);
INSERT INTO "runs" VALUES('0963e74458524eeb83417a9df315af9a','knn-database.plain','UNKNOWN','','','unknown','FINISHED',1796002374784,1796002377759,'','active','@ROOT@/mlflow/0963e74458524eeb83417a9df315af9a/artifacts',1,NULL);
INSERT INTO "runs" VALUES('eb163d614d5443f1860d08b9f081751b','plain','UNKNOWN','','','unknown','FINISHED',1796002379148,1796002455692,'','active','@ROOT@/mlflow/eb163d614d5443f1860d08b9f081751b/artifacts',2,NULL);
INSERT INTO "runs" VALUES('bb04669dfa604f1ba0c0696115781552','knn-diffusion on plain','UNKNOWN','','','unknown','FINISHED',1796002458845,1796002479468,'','active','@ROOT@/mlflow/bb04669dfa604f1ba0c0696115781552/artifacts',3,NULL);
INSERT INTO "runs" VALUES('a4a175bd73dc4f0ea9b9f425089c01cd','knn-database.shapes','UNKNOWN','','','unknown','FINISHED',1796002511395,1796002511624,'','active','@ROOT@/mlflow/a4a175bd73dc4f0ea9b9f425089c01cd/artifacts',1,NULL);
INSERT INTO "runs" VALUES('872d04c3883f4cd6b7bc799382fa970b','knn-database.shapes','UNKNOWN','','','unknown','FINISHED',1796002566890,1796002567236,'','active','@ROOT@/mlflow/872d04c3883f4cd6b7bc799382fa970b/artifacts',1,NULL);
INSERT INTO "runs" VALUES('04913718d0e64df4a460c060036d9221','knn-database.shapes','UNKNOWN','','','unknown','FINISHED',1796002589308,1796002589571,'','active','@ROOT@/mlflow/04913718d0e64df4a460c060036d9221/artifacts',1,NULL);
CREATE TABLE scheduler_leases (
	lease_key VARCHAR(255) NOT NULL, 
	acquired_at BIGINT NOT NULL, 
	ttl_seconds INTEGER NOT NULL, 
	CONSTRAINT scheduler_leases_pk PRIMARY KEY (lease_key)
);
CREATE TABLE scorer_versions (
	scorer_id VARCHAR(36) NOT NULL, 
	scorer_version INTEGER NOT NULL, 
	serialized_scorer TEXT NOT NULL, 
	creation_time BIGINT, 
	CONSTRAINT scorer_version_pk PRIMARY KEY (scorer_id, scorer_version), 
	CONSTRAINT fk_scorer_versions_scorer_id FOREIGN KEY(scorer_id) REFERENCES scorers (scorer_id) ON DELETE CASCADE
);
CREATE TABLE scorers (
	experiment_id INTEGER NOT NULL, 
	scorer_name VARCHAR(256) NOT NULL, 
	scorer_id VARCHAR(36) NOT NULL, 
	CONSTRAINT scorer_pk PRIMARY KEY (scorer_id), 
	CONSTRAINT fk_scorers_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
CREATE TABLE "secrets" (
	secret_id VARCHAR(36) NOT NULL, 
	secret_name VARCHAR(255) NOT NULL, 
	encrypted_value BLOB NOT NULL, 
	wrapped_dek BLOB NOT NULL, 
	kek_version INTEGER NOT NULL, 
	masked_value VARCHAR(500) NOT NULL, 
	provider VARCHAR(64), 
	auth_config TEXT, 
	description TEXT, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT secrets_pk PRIMARY KEY (secret_id), 
	CONSTRAINT uq_secrets_workspace_secret_name UNIQUE (workspace, secret_name)
);
CREATE TABLE span_metrics (
	trace_id VARCHAR(50) NOT NULL, 
	span_id VARCHAR(50) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT, 
	CONSTRAINT span_metrics_pk PRIMARY KEY (trace_id, span_id, "key"), 
	CONSTRAINT fk_span_metrics_span FOREIGN KEY(trace_id, span_id) REFERENCES spans (trace_id, span_id) ON DELETE CASCADE
);
CREATE TABLE "spans" (
	trace_id VARCHAR(50) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	span_id VARCHAR(50) NOT NULL, 
	parent_span_id VARCHAR(50), 
	name TEXT, 
	type VARCHAR(500), 
	status VARCHAR(50) NOT NULL, 
	start_time_unix_nano BIGINT NOT NULL, 
	end_time_unix_nano BIGINT, 
	duration_ns BIGINT GENERATED ALWAYS AS (end_time_unix_nano - start_time_unix_nano) STORED, 
	content TEXT NOT NULL, 
	input_cost FLOAT, 
	output_cost FLOAT, 
	total_cost FLOAT, 
	model_name VARCHAR(500), 
	model_provider VARCHAR(500), 
	CONSTRAINT spans_pk PRIMARY KEY (trace_id, span_id), 
	CONSTRAINT fk_spans_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_spans_trace_id FOREIGN KEY(trace_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE sql_assessment_daily_rollups (
	id INTEGER NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	metric_name VARCHAR(250) NOT NULL, 
	grouping_set VARCHAR(50) NOT NULL, 
	sample_count BIGINT NOT NULL, 
	sum_value FLOAT, 
	min_value FLOAT, 
	max_value FLOAT, 
	CONSTRAINT sql_assessment_daily_rollups_pk PRIMARY KEY (id)
);
CREATE TABLE sql_span_cost_daily_rollups (
	id INTEGER NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	metric_name VARCHAR(250) NOT NULL, 
	grouping_set VARCHAR(50) NOT NULL, 
	model_name VARCHAR(500), 
	model_provider VARCHAR(500), 
	sample_count BIGINT NOT NULL, 
	sum_value FLOAT, 
	min_value FLOAT, 
	max_value FLOAT, 
	CONSTRAINT sql_span_cost_daily_rollups_pk PRIMARY KEY (id)
);
CREATE TABLE sql_trace_metric_daily_rollups (
	id INTEGER NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	metric_name VARCHAR(250) NOT NULL, 
	grouping_set VARCHAR(50) NOT NULL, 
	trace_status VARCHAR(50), 
	sample_count BIGINT NOT NULL, 
	sum_value FLOAT, 
	min_value FLOAT, 
	max_value FLOAT, 
	p50_value FLOAT, 
	p90_value FLOAT, 
	p99_value FLOAT, 
	CONSTRAINT sql_trace_metric_daily_rollups_pk PRIMARY KEY (id)
);
CREATE TABLE sql_trace_rollup_rebuild_queue (
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	rollup_family VARCHAR(50) NOT NULL, 
	CONSTRAINT sql_trace_rollup_rebuild_queue_pk PRIMARY KEY (experiment_id, rollup_day, rollup_family)
);
CREATE TABLE "tags" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000), 
	run_uuid VARCHAR(32) NOT NULL, 
	CONSTRAINT tag_pk PRIMARY KEY ("key", run_uuid), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid)
);
INSERT INTO "tags" VALUES('mlflow.runName','knn-database.plain','0963e74458524eeb83417a9df315af9a');
INSERT INTO "tags" VALUES('mlflow.runName','plain','eb163d614d5443f1860d08b9f081751b');
INSERT INTO "tags" VALUES('mlflow.runName','knn-diffusion on plain','bb04669dfa604f1ba0c0696115781552');
INSERT INTO "tags" VALUES('mlflow.runName','knn-database.shapes','a4a175bd73dc4f0ea9b9f425089c01cd');
INSERT INTO "tags" VALUES('mlflow.runName','knn-database.shapes','872d04c3883f4cd6b7bc799382fa970b');
INSERT INTO "tags" VALUES('mlflow.runName','knn-database.shapes','04913718d0e64df4a460c060036d9221');
CREATE TABLE "trace_info" (
	request_id VARCHAR(50) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	timestamp_ms BIGINT NOT NULL, 
	execution_time_ms BIGINT, 
	status VARCHAR(50) NOT NULL, 
	client_request_id VARCHAR(50), 
	request_preview VARCHAR(1000), 
	response_preview VARCHAR(1000), 
	db_payload_generation INTEGER DEFAULT '0' NOT NULL, trace_name VARCHAR(4096), session_id VARCHAR(250), input_tokens BIGINT, output_tokens BIGINT, total_tokens BIGINT, cache_read_input_tokens BIGINT, cache_creation_input_tokens BIGINT, cache_creation_input_tokens_above_1hr BIGINT, input_cost FLOAT, output_cost FLOAT, total_cost FLOAT, 
	CONSTRAINT trace_info_pk PRIMARY KEY (request_id), 
	CONSTRAINT fk_trace_info_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
CREATE TABLE trace_metrics (
	request_id VARCHAR(50) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT, 
	CONSTRAINT trace_metrics_pk PRIMARY KEY (request_id, "key"), 
	CONSTRAINT fk_trace_metrics_request_id FOREIGN KEY(request_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE "trace_request_metadata" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000), 
	request_id VARCHAR(50) NOT NULL, 
	CONSTRAINT trace_request_metadata_pk PRIMARY KEY ("key", request_id), 
	CONSTRAINT fk_trace_request_metadata_request_id FOREIGN KEY(request_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE "trace_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000), 
	request_id VARCHAR(50) NOT NULL, 
	CONSTRAINT trace_tag_pk PRIMARY KEY ("key", request_id), 
	CONSTRAINT fk_trace_tags_request_id FOREIGN KEY(request_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE webhook_events (
	webhook_id VARCHAR(256) NOT NULL, 
	entity VARCHAR(50) NOT NULL, 
	action VARCHAR(50) NOT NULL, 
	CONSTRAINT webhook_event_pk PRIMARY KEY (webhook_id, entity, action), 
	FOREIGN KEY(webhook_id) REFERENCES webhooks (webhook_id) ON DELETE cascade
);
CREATE TABLE "webhooks" (
	webhook_id VARCHAR(256) NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	description VARCHAR(1000), 
	url VARCHAR(500) NOT NULL, 
	status VARCHAR(20) DEFAULT 'ACTIVE' NOT NULL, 
	secret VARCHAR(1000), 
	creation_timestamp BIGINT, 
	last_updated_timestamp BIGINT, 
	deleted_timestamp BIGINT, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT webhook_pk PRIMARY KEY (webhook_id)
);
CREATE TABLE workspaces (
	name VARCHAR(63) NOT NULL, 
	description TEXT, 
	default_artifact_root TEXT, trace_archival_location TEXT, trace_archival_retention VARCHAR(32), 
	CONSTRAINT workspaces_pk PRIMARY KEY (name)
);
INSERT INTO "workspaces" VALUES('default','Default workspace for legacy resources',NULL,NULL,NULL);
CREATE INDEX index_metrics_run_uuid ON metrics (run_uuid);
CREATE INDEX index_latest_metrics_run_uuid ON latest_metrics (run_uuid);
CREATE INDEX index_inputs_input_uuid ON inputs (input_uuid);
CREATE INDEX index_inputs_destination_type_destination_id_source_type ON inputs (destination_type, destination_id, source_type);
CREATE INDEX index_params_run_uuid ON params (run_uuid);
CREATE INDEX index_trace_tags_request_id ON trace_tags (request_id);
CREATE INDEX index_trace_request_metadata_request_id ON trace_request_metadata (request_id);
CREATE INDEX index_tags_run_uuid ON tags (run_uuid);
CREATE INDEX index_datasets_experiment_id_dataset_source_type ON datasets (experiment_id, dataset_source_type);
CREATE INDEX index_datasets_dataset_uuid ON datasets (dataset_uuid);
CREATE INDEX index_logged_model_metrics_model_id ON logged_model_metrics (model_id);
CREATE INDEX index_entity_associations_association_id ON entity_associations (association_id);
CREATE INDEX index_entity_associations_reverse_lookup ON entity_associations (destination_type, destination_id, source_type, source_id);
CREATE INDEX idx_webhook_events_entity ON webhook_events (entity);
CREATE INDEX idx_webhook_events_action ON webhook_events (action);
CREATE INDEX idx_webhook_events_entity_action ON webhook_events (entity, action);
CREATE UNIQUE INDEX index_scorers_experiment_id_scorer_name ON scorers (experiment_id, scorer_name);
CREATE INDEX index_scorer_versions_scorer_id ON scorer_versions (scorer_id);
CREATE INDEX index_evaluation_dataset_tags_dataset_id ON evaluation_dataset_tags (dataset_id);
CREATE INDEX index_evaluation_dataset_records_dataset_id ON evaluation_dataset_records (dataset_id);
CREATE INDEX index_endpoint_model_mappings_endpoint_id ON endpoint_model_mappings (endpoint_id);
CREATE INDEX index_endpoint_model_mappings_model_definition_id ON endpoint_model_mappings (model_definition_id);
CREATE INDEX index_endpoint_tags_endpoint_id ON endpoint_tags (endpoint_id);
CREATE INDEX index_trace_metrics_request_id ON trace_metrics (request_id);
CREATE UNIQUE INDEX unique_endpoint_model_linkage_mapping ON endpoint_model_mappings (endpoint_id, model_definition_id, linkage_type);
CREATE INDEX index_span_metrics_trace_id_span_id ON span_metrics (trace_id, span_id);
CREATE INDEX index_evaluation_datasets_created_time ON evaluation_datasets (created_time);
CREATE INDEX index_evaluation_datasets_name ON evaluation_datasets (name);
CREATE INDEX idx_webhooks_name ON webhooks (name);
CREATE INDEX idx_webhooks_status ON webhooks (status);
CREATE TRIGGER prevent_secrets_aad_mutation
BEFORE UPDATE ON secrets
FOR EACH ROW
WHEN OLD.secret_id != NEW.secret_id OR OLD.secret_name != NEW.secret_name
BEGIN
    SELECT RAISE(ABORT, 'secret_id and secret_name are immutable (used as AAD in encryption)');
END;
CREATE INDEX index_model_definitions_provider ON model_definitions (provider);
CREATE INDEX index_model_definitions_secret_id ON model_definitions (secret_id);
CREATE INDEX index_jobs_name_status_creation_time ON jobs (job_name, workspace, status, creation_time);
CREATE INDEX idx_experiments_workspace ON experiments (workspace);
CREATE INDEX idx_registered_models_workspace ON registered_models (workspace);
CREATE INDEX idx_experiments_workspace_creation_time ON experiments (workspace, creation_time);
CREATE INDEX idx_evaluation_datasets_workspace ON evaluation_datasets (workspace);
CREATE INDEX idx_webhooks_workspace ON webhooks (workspace);
CREATE INDEX idx_secrets_workspace ON secrets (workspace);
CREATE INDEX idx_endpoints_workspace ON endpoints (workspace);
CREATE INDEX idx_model_definitions_workspace ON model_definitions (workspace);
CREATE INDEX idx_budget_policies_workspace ON budget_policies (workspace);
CREATE INDEX index_issues_experiment_id ON issues (experiment_id);
CREATE INDEX index_issues_source_run_id ON issues (source_run_id);
CREATE INDEX index_issues_status ON issues (status);
CREATE INDEX index_metrics_run_uuid_key_step ON metrics (run_uuid, "key", step);
CREATE INDEX idx_guardrails_workspace ON guardrails (workspace);
CREATE INDEX idx_guardrails_scorer ON guardrails (scorer_id, scorer_version);
CREATE INDEX idx_guardrail_configs_endpoint_id ON guardrail_configs (endpoint_id);
CREATE INDEX idx_guardrail_configs_guardrail_id ON guardrail_configs (guardrail_id);
CREATE INDEX idx_model_version_tags_workspace_name_version ON model_version_tags (workspace, name, version);
CREATE INDEX idx_registered_model_tags_workspace_name ON registered_model_tags (workspace, name);
CREATE INDEX index_label_schemas_experiment_id ON label_schemas (experiment_id);
CREATE INDEX index_review_queues_experiment_id ON review_queues (experiment_id);
CREATE INDEX index_review_queue_users_user_id ON review_queue_users (user_id);
CREATE INDEX index_review_queue_items_queue_id_status ON review_queue_items (queue_id, status);
CREATE INDEX index_review_queue_items_item_id ON review_queue_items (item_id);
CREATE INDEX index_review_queue_label_schemas_schema_id ON review_queue_label_schemas (schema_id);
CREATE INDEX idx_mcp_server_versions_latest ON mcp_server_versions (workspace, name, status, version_major DESC, version_minor DESC, version_patch DESC);
CREATE INDEX ix_mcp_access_endpoints_server_name ON mcp_access_endpoints (workspace, server_name);
CREATE INDEX ix_mcp_access_endpoints_version ON mcp_access_endpoints (workspace, server_name, server_version);
CREATE INDEX ix_mcp_access_endpoints_alias ON mcp_access_endpoints (workspace, server_name, server_alias);
CREATE INDEX idx_budget_policies_target_value ON budget_policies (target_value);
CREATE INDEX index_trace_info_experiment_id_timestamp_ms ON trace_info (experiment_id, timestamp_ms);
CREATE INDEX index_trace_info_timestamp_ms_request_id ON trace_info (timestamp_ms, request_id);
CREATE INDEX index_assessments_trace_id_created_timestamp ON assessments (trace_id, created_timestamp);
CREATE INDEX index_assessments_last_updated_timestamp ON assessments (last_updated_timestamp);
CREATE INDEX index_assessments_run_id_created_timestamp ON assessments (run_id, created_timestamp);
CREATE INDEX index_assessments_assessment_type ON assessments (assessment_type);
CREATE INDEX index_spans_experiment_id_type_status ON spans (experiment_id, type, status);
CREATE INDEX index_spans_experiment_id_duration ON spans (experiment_id, duration_ns);
CREATE INDEX index_spans_experiment_id_status_type ON spans (experiment_id, status, type);
CREATE INDEX index_spans_experiment_id_start_time ON spans (experiment_id, start_time_unix_nano);
CREATE INDEX index_trace_info_experiment_id_session_id ON trace_info (experiment_id, session_id);
CREATE INDEX idx_trace_rollups_lookup ON sql_trace_metric_daily_rollups (experiment_id, rollup_day, metric_name, grouping_set, trace_status);
CREATE INDEX idx_span_cost_rollups_lookup ON sql_span_cost_daily_rollups (experiment_id, rollup_day, metric_name, grouping_set, model_name, model_provider);
CREATE INDEX idx_assessment_rollups_lookup ON sql_assessment_daily_rollups (experiment_id, rollup_day, metric_name, grouping_set);
CREATE INDEX idx_spans_cost_trace_time_cover ON spans (trace_id, start_time_unix_nano);
CREATE INDEX idx_spans_cost_exp_time_cover ON spans (experiment_id, start_time_unix_nano);
CREATE INDEX idx_assessments_exp_trace_ts ON assessments (experiment_id, trace_timestamp_ms);
CREATE INDEX idx_assessments_exp_trace_ts_name ON assessments (experiment_id, trace_timestamp_ms, name);
CREATE INDEX idx_assessments_exp_name_valid ON assessments (experiment_id, name, valid);
CREATE INDEX index_job_locks_job_id ON job_locks (job_id);
CREATE INDEX index_jobs_status_lease_expires_at ON jobs (status, lease_expires_at);
COMMIT;
